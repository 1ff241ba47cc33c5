"""What each command was asked to do, checked as far as it can be before anything heavy is loaded.

Invariant: settings that exist hold valid values; what depends on the model is left to the engine. A key's characters
never appear in a message.
"""

from __future__ import annotations

import json
import logging
import math
import stat
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qengine import environment
from qengine.client.address import Address, parse_address
from qengine.commands.flags import (
    ADDRESS_FLAGS,
    CARD_MEMORY,
    CARD_NAMES,
    ENGINE_GROUPS,
    MONITORING_FLAGS,
    SAMPLING_FLAGS,
    SERVER_FLAGS,
    Group,
)
from qengine.commands.parsing import Invocation
from qengine.config import AUTO, EngineConfig, LoadConfig, nearest, parse_memory
from qengine.errors import ConfigError
from qengine.request import SamplingParams
from qengine.serving.exposure import check_key
from qengine.serving.options import ServerOptions

logger = logging.getLogger(__name__)

#: A key file larger than this is a mistake, such as a model's name in the wrong place.
_MAX_KEY_FILE_BYTES = 1 << 20
_SMALLEST_CARD_BYTES, _LARGEST_CARD_BYTES = 1 << 28, 1 << 40


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """What `qengine serve` was asked for, all of it checked."""

    engine: EngineConfig
    server: ServerOptions


@dataclass(frozen=True, slots=True)
class GenerateSettings:
    """`sampling` holds SamplingParams by name, only those that were given: the model's defaults fill the rest."""

    engine: EngineConfig
    prompts: tuple[str, ...]
    sampling: Mapping[str, Any]
    use_chat_template: bool
    as_json: bool


@dataclass(frozen=True, slots=True)
class Remote:
    """A server, and the model to ask there; None for its first."""

    address: Address
    api_key: str | None = None
    model: str | None = None


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """`sampling` as in GenerateSettings; with `remote` the server answers, and `engine` is not used."""

    engine: EngineConfig
    sampling: Mapping[str, Any]
    system: str | None = None
    remote: Remote | None = None


@dataclass(frozen=True, slots=True)
class InspectSettings:
    """`gpu` is one of CARD_NAMES, None for this machine; `bytes_per_s` None for what is known of the device."""

    load: LoadConfig
    gpu: str | None = None
    num_sequences: int = 1
    bytes_per_s: float | None = None
    as_json: bool = False


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """`cards` are (name, bytes); None asks this machine's driver, and so does AUTO, which insists on a card.

    `num_ranks` None is as many as there are cards in `cards`, else 1.
    """

    engine: EngineConfig
    cards: tuple[tuple[str, int], ...] | Literal["auto"] | None = None
    num_ranks: int | None = None
    as_json: bool = False


@dataclass(frozen=True, slots=True)
class EvaluateSettings:
    """`options` are those of the engine, checked; sizes that are None are chosen by the model."""

    model: str | None
    options: Mapping[str, Any]
    against: str | None = None
    text: str = "builtin"
    window: int | None = None
    stride: int | None = None
    max_tokens: int | None = None
    as_json: bool = False


def serve_settings(given: Invocation) -> ServeSettings:
    """Raises ConfigError."""
    engine = engine_config(given.options)
    options = _pick(given.options, (ADDRESS_FLAGS, SERVER_FLAGS, MONITORING_FLAGS))
    if "uds" in options and not given.on_command_line.isdisjoint({"host", "port"}):
        raise ConfigError("--uds takes the place of --host and --port; give one or the other")
    _check_tls(options)
    if "api_key" in given.on_command_line:
        logger.warning(
            "--api-key is visible to this machine's users in the process list; "
            "QENGINE_API_KEY or --api-key-file keeps it out"
        )
    keys = _api_keys(options.pop("api_key", ()), options.pop("api_key_file", None))
    names = options.pop("served_model_name", ())
    if "allowed_origins" in options:
        options["allowed_origins"] = tuple(o for text in options["allowed_origins"] for o in _origins(text))
    for name in ("ssl_keyfile", "ssl_certfile"):
        if name in options:
            options[name] = str(Path(options[name]).expanduser())
    return ServeSettings(engine, ServerOptions(**{**options, "api_keys": keys, "served_model_names": names}))


def generate_settings(given: Invocation) -> GenerateSettings:
    """Reads standard input for `--prompt -`. Raises ConfigError or RequestError."""
    engine = engine_config(given.options)
    sampling = _sampling({"max_tokens": 256}, given.options)
    prompts = given.options.get("prompt", ())
    if not prompts:
        raise ConfigError("nothing to continue; give --prompt TEXT, or --prompt - to read it from standard input")
    if prompts.count("-") > 1:
        raise ConfigError("--prompt - was given twice, but standard input can be read once")
    texts = tuple(_read_standard_input() if prompt == "-" else _check_text(prompt, "--prompt") for prompt in prompts)
    return GenerateSettings(
        engine, texts, sampling, bool(given.options.get("chat", False)), bool(given.options.get("json", False))
    )


def chat_settings(given: Invocation) -> ChatSettings:
    """Raises ConfigError or RequestError."""
    system = given.options.get("system")
    remote = remote_server(given.options)
    return ChatSettings(
        EngineConfig() if remote is not None else engine_config(given.options),
        _sampling({"max_tokens": None}, given.options),
        None if system is None else _check_text(system, "--system"),
        remote,
    )


def remote_server(options: Mapping[str, Any]) -> Remote | None:
    """The server that --url names, if it is given; then flags of a local engine would do nothing."""
    url, key = options.get("url"), options.get("api_key")
    if url is None:
        if key is not None:
            raise ConfigError("--api-key is for a server; give its --url too")
        return None
    local = [flag.name for group in ENGINE_GROUPS for flag in group.flags if flag.dest in options]
    local = [name for name in local if name != "--seed"]
    if local:
        raise ConfigError(f"{local[0]} is for a model in this process, but --url asks a server; give one or the other")
    if key is None:
        key = environment.api_key()
    elif not key.isascii() or not key.isprintable():
        raise ConfigError("--api-key has characters other than printable ASCII")
    return Remote(parse_address(url), key, options.get("model"))


def inspect_settings(given: Invocation) -> InspectSettings:
    """Raises ConfigError."""
    options = given.options
    load = engine_config(options).load
    gpu = options.get("gpu")
    if gpu is not None:
        gpu = _check_card(gpu)
        if load.device == "cpu":
            raise ConfigError("--gpu and --device cpu contradict each other; give one or the other")
    num_sequences = options.get("rows", 1)
    if num_sequences < 1:
        raise ConfigError(f"--rows is {num_sequences}, expected the sequences of a step, at least 1")
    bandwidth = options.get("bandwidth")
    if bandwidth is not None and not (math.isfinite(bandwidth) and bandwidth > 0):
        raise ConfigError(f"--bandwidth is {bandwidth}, expected GB/s above zero, such as 50")
    bytes_per_s = None if bandwidth is None else bandwidth * 1e9
    return InspectSettings(load, gpu, num_sequences, bytes_per_s, bool(options.get("json", False)))


def plan_settings(given: Invocation) -> PlanSettings:
    """Raises ConfigError."""
    options = dict(given.options)
    # Ranks are planned here and not run, so the engine's own limit is not asked.
    tp = options.pop("tensor_parallel_size", None)
    engine = engine_config(options)
    if tp is not None and tp < 1:
        raise ConfigError(f"--tensor-parallel-size is {tp}, expected a whole number of at least 1")
    gpu = options.get("gpu")
    cards = None if gpu is None else _cards(gpu)
    if gpu is not None and engine.load.device == "cpu":
        raise ConfigError("--gpu and --device cpu contradict each other; give one or the other")
    pp = engine.parallel.pipeline_parallel_size
    num_ranks = None if tp is None and pp == 1 else (tp or 1) * pp
    if isinstance(cards, tuple) and len(cards) > 1:
        num_ranks = _ranks_of_cards(len(cards), tp, pp)
    return PlanSettings(engine, cards, num_ranks, bool(options.get("json", False)))


def _ranks_of_cards(num_cards: int, tp: int | None, pp: int) -> int:
    """One for each of several cards that are named, where that agrees with what else is asked."""
    if num_cards % pp if tp is None else num_cards != tp * pp:
        asked = [f"{flag} is {size}" for flag, size in (("-tp", tp), ("-pp", pp)) if size not in (None, 1)]
        raise ConfigError(
            f"--gpu names {num_cards} cards and {' and '.join(asked)}; name one card for all ranks, or one for each"
        )
    return num_cards


def evaluate_settings(given: Invocation) -> EvaluateSettings:
    """Raises ConfigError."""
    options = given.options
    engine_config(options)
    sizes = {name: options.get(name) for name in ("window", "stride", "max_tokens")}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ConfigError(f"{name} is {size}, expected a whole number of at least 1")
    return EvaluateSettings(
        options.get("model"),
        _pick(options, ENGINE_GROUPS),
        against=options.get("against"),
        text=options.get("text", "builtin"),
        as_json=bool(options.get("json", False)),
        **sizes,
    )


def _cards(text: str) -> tuple[tuple[str, int], ...] | Literal["auto"]:
    """What --gpu names: "auto", or sizes and names of cards with commas between them."""
    if text.strip().lower() == AUTO:
        return AUTO
    return tuple(_card_of(part.strip()) for part in text.split(","))


def _card_of(text: str) -> tuple[str, int]:
    name = text.lower()
    if name in CARD_MEMORY:
        return name.upper() if name[0].isalpha() else f"RTX {name}", int(CARD_MEMORY[name] * 2**30)
    try:
        num_bytes = parse_memory(text, "--gpu")
    except ConfigError:
        num_bytes = 0
    # No card has so much or so little; and what is a card's name in other ears must not pass as its GiB.
    if not _SMALLEST_CARD_BYTES <= num_bytes <= _LARGEST_CARD_BYTES:
        hint, known = nearest(name, list(CARD_MEMORY)), ", ".join(CARD_MEMORY)
        raise ConfigError(f"--gpu '{text}' is no size such as 24GB and no known card{hint} (known: {known})")
    return f"{num_bytes / 2**30:g} GiB card", num_bytes


def _check_card(name: str) -> str:
    if name.lower() not in CARD_NAMES:
        hint = nearest(name.lower(), CARD_NAMES)
        raise ConfigError(f"--gpu '{name}' is not a card with known figures{hint} (known: {', '.join(CARD_NAMES)})")
    return name.lower()


def _pick(options: Mapping[str, Any], groups: Iterable[Group]) -> dict[str, Any]:
    names = {flag.dest for group in groups for flag in group.flags}
    return {name: value for name, value in options.items() if name in names}


def engine_config(options: Mapping[str, Any]) -> EngineConfig:
    """The engine that a command's options describe. Raises ConfigError."""
    picked = _pick(options, ENGINE_GROUPS)
    if picked.pop("trust_remote_code", False):
        logger.warning("--trust-remote-code has no effect: qengine never runs code from a checkpoint")
    if "model" in options:
        picked["model"] = options["model"]
    return EngineConfig.from_options(picked)


def _sampling(defaults: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    sampling = {**defaults, **_pick(options, (SAMPLING_FLAGS,))}
    if "max_tokens" in options:
        sampling["max_tokens"] = options["max_tokens"]
    if "seed" in options:
        sampling["seed"] = options["seed"]
    SamplingParams(**sampling)
    return sampling


def _check_text(text: str, flag: str) -> str:
    """Refuse bytes that were not UTF-8: the shell hands them over as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"{flag} is not valid UTF-8 text") from None
    return text


def _read_standard_input() -> str:
    if sys.stdin is None:
        raise ConfigError("--prompt - needs standard input, but it is closed")
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompt -: standard input is not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise ConfigError("--prompt -: standard input is empty")
    return text


# Keys, certificates, origins


def _origins(text: str) -> tuple[str, ...]:
    """One origin, or several as a JSON list, which is how vLLM takes them."""
    if not text.startswith("["):
        return (text,)
    try:
        origins = json.loads(text)
    except json.JSONDecodeError:
        origins = None
    if not isinstance(origins, list) or not all(isinstance(origin, str) for origin in origins):
        raise ConfigError(f"--allowed-origins is '{text}', expected origins or a JSON list of them")
    return tuple(origins)


def _check_tls(options: Mapping[str, Any]) -> None:
    for name, other in (("ssl_keyfile", "ssl_certfile"), ("ssl_certfile", "ssl_keyfile")):
        file = options.get(name)
        if file is None:
            continue
        flag = "--" + name.replace("_", "-")
        if options.get(other) is None:
            raise ConfigError(f"{flag} needs --{other.replace('_', '-')} too")
        if not Path(file).expanduser().is_file():
            raise ConfigError(f"{flag}: no file at '{file}'")


def _api_keys(given: tuple[str, ...], file: str | None) -> tuple[str, ...]:
    """All keys from the flags, the file and the environment, each checked."""
    keys = [check_key(key, "--api-key") for key in given]
    if file is not None:
        keys += _keys_in_file(file)
    from_environment = environment.api_key()
    if from_environment is not None:
        keys.append(check_key(from_environment, "QENGINE_API_KEY"))
    return tuple(dict.fromkeys(keys))


def _keys_in_file(file: str) -> list[str]:
    path = Path(file).expanduser()
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISFIFO(status.st_mode):
            raise ConfigError(f"--api-key-file: '{file}' is not a file")
        if status.st_size > _MAX_KEY_FILE_BYTES:
            raise ConfigError(f"--api-key-file: '{file}' has {status.st_size} bytes, expected one key per line")
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--api-key-file {file}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"--api-key-file: '{file}' is not text") from None
    if stat.S_ISREG(status.st_mode) and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        logger.warning(
            "--api-key-file: other users may read '%s' (mode %04o); run: chmod 600 '%s'",
            file,
            stat.S_IMODE(status.st_mode),
            file,
        )
    keys = [check_key(line.strip(), f"--api-key-file {file}") for line in content.splitlines() if line.strip()]
    if not keys:
        raise ConfigError(f"--api-key-file: '{file}' holds no key; write one per line")
    return keys
