"""What `qengine bench` was asked to do, checked before anything heavy is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qengine.bench.figures import BOUNDS
from qengine.bench.load import parse_bounds
from qengine.bench.report import check_chart
from qengine.commands.flags import ENGINE_GROUPS
from qengine.commands.parsing import Invocation
from qengine.commands.settings import Remote, engine_config, remote_server
from qengine.config import EngineConfig
from qengine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BenchServeSettings:
    """`remote` is the server to load; without one `serve_words` start it. `bounds_ms` is what --goodput asks for."""

    remote: Remote | None
    serve_words: tuple[str, ...]
    rates: tuple[float, ...]
    num_prompts: int
    input_len: int
    output_len: int
    vocab_size: int
    seed: int
    bounds_ms: Mapping[str, float]
    dataset: Path | None = None
    json_file: Path | None = None
    chart_file: Path | None = None


@dataclass(frozen=True, slots=True)
class BenchOfflineSettings:
    """Lengths in tokens."""

    engine: EngineConfig
    batches: tuple[int, ...]
    input_len: int
    output_len: int
    num_runs: int
    json_file: Path | None = None


def bench_serve_settings(given: Invocation) -> BenchServeSettings:
    """Raises ConfigError."""
    options = given.options
    remote = remote_server(options)
    if remote is None:
        engine_config(options)
    rates = options.get("request_rate", (math.inf,))
    for rate in rates:
        if math.isnan(rate) or rate <= 0:
            raise ConfigError(f"--request-rate is {rate:g}, expected requests per second above zero, or inf")
    chart = options.get("plot")
    if chart is not None:
        check_chart(chart)
    dataset = options.get("dataset_path")
    return BenchServeSettings(
        remote,
        () if remote is not None else _serve_words(options),
        tuple(rates),
        num_prompts=_positive(options, "num_prompts", 100),
        input_len=_positive(options, "random_input_len", 128),
        output_len=_positive(options, "random_output_len", 64),
        vocab_size=_positive(options, "vocab_size", 1000),
        seed=options.get("seed", 0),
        bounds_ms=parse_bounds(options.get("goodput", ()), BOUNDS),
        dataset=None if dataset is None else Path(dataset).expanduser(),
        json_file=_output_file(options),
        chart_file=None if chart is None else Path(chart).expanduser(),
    )


def bench_offline_settings(given: Invocation) -> BenchOfflineSettings:
    """Raises ConfigError."""
    options = given.options
    batches = options.get("batch", (1, 16))
    for batch in batches:
        if batch < 1:
            raise ConfigError(f"--batch is {batch}, expected at least 1 sequence")
    return BenchOfflineSettings(
        engine_config(options),
        tuple(dict.fromkeys(batches)),
        input_len=_positive(options, "random_input_len", 128),
        output_len=_positive(options, "random_output_len", 64),
        num_runs=_positive(options, "runs", 3),
        json_file=_output_file(options),
    )


def _positive(options: Mapping[str, Any], name: str, default: int) -> int:
    value: int = options.get(name, default)
    if value < 1:
        raise ConfigError(f"{name} is {value}, expected at least 1")
    return value


def _output_file(options: Mapping[str, Any]) -> Path | None:
    """Where the JSON goes; refused now if its folder is not there, not after minutes of measuring."""
    if "json" not in options:
        return None
    path = Path(options["json"]).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--json is '{path}', expected a file in a folder that exists")
    return path


def _serve_words(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The command line that starts a server with the engine flags that were given."""
    words = [options["model"]] if "model" in options else []
    for flag in (flag for group in ENGINE_GROUPS for flag in group.flags):
        value = options.get(flag.dest)
        if value is True:
            words.append(flag.name)
        elif value is False and flag.kind == "on/off":
            words.append(f"--no-{flag.name[2:]}")
        elif value is not None and value is not False:
            words += [flag.name, str(value)]
    return tuple(words)
