"""What is sent, and when.

Invariant: the same seed gives the same load; all of it is made before the first request, so that making it costs no
time of the run.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qengine.errors import ConfigError

#: Ids below are often special tokens.
_FIRST_TOKEN_ID = 100


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """A prompt as text or token ids, and how many tokens to answer with."""

    prompt: str | tuple[int, ...]
    max_tokens: int

    def body(self, model: str) -> dict[str, Any]:
        """The request to /v1/completions. The length is fixed, so that every run does the same work."""
        prompt = self.prompt if isinstance(self.prompt, str) else list(self.prompt)
        fields = {"temperature": 0.0, "max_tokens": self.max_tokens, "ignore_eos": True}
        return {"model": model, "prompt": prompt, **fields, "stream": True, "stream_options": {"include_usage": True}}


def random_ids(num_tokens: int, vocab_size: int, seed: int) -> list[int]:
    """Token ids drawn evenly; different seeds share no prefix worth caching."""
    draw = random.Random(seed)
    first = _FIRST_TOKEN_ID if vocab_size > 2 * _FIRST_TOKEN_ID else 0
    return [draw.randrange(first, vocab_size) for _ in range(num_tokens)]


def random_load(num_requests: int, input_len: int, output_len: int, vocab_size: int, seed: int) -> list[LoadRequest]:
    """Prompts of `input_len` random tokens each."""
    prompts = (random_ids(input_len, vocab_size, seed * 1_000_003 + index) for index in range(num_requests))
    return [LoadRequest(tuple(prompt), output_len) for prompt in prompts]


def file_load(path: Path, num_requests: int, output_len: int) -> list[LoadRequest]:
    """Requests of a file with one JSON object per line: "prompt", and "max_tokens" or else `output_len`.

    It begins again where it is too short.

    Raises:
        ConfigError: naming the line that is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--dataset-path: cannot read '{path}': {error}") from error
    found = [
        _from_line(f"{path}:{number}", line, output_len) for number, line in enumerate(lines, start=1) if line.strip()
    ]
    if not found:
        raise ConfigError(f'--dataset-path: \'{path}\' is empty, expected lines such as {{"prompt": "Hello"}}')
    return list(itertools.islice(itertools.cycle(found), num_requests))


def _from_line(where: str, line: str, output_len: int) -> LoadRequest:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON: {error}") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise ConfigError(f'{where} has no text in "prompt"')
    max_tokens = record.get("max_tokens", output_len)
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
        raise ConfigError(f'{where} has "max_tokens": {max_tokens!r}, expected a whole number of at least 1')
    return LoadRequest(prompt, max_tokens)


def arrival_times(num_requests: int, rate: float, seed: int) -> list[float]:
    """When each request is due, in seconds: a Poisson process of `rate` per second, or all at once for inf."""
    if math.isinf(rate):
        return [0.0] * num_requests
    draw = random.Random(seed)
    return list(itertools.accumulate(draw.expovariate(rate) for _ in range(num_requests)))


def parse_bounds(texts: Sequence[str], known: Sequence[str]) -> dict[str, float]:
    """ "ttft:1000" and so on as milliseconds by name. Raises ConfigError."""
    bounds = {}
    for text in texts:
        name, _, value = text.partition(":")
        try:
            bound = float(value)
        except ValueError:
            bound = math.nan
        if name not in known or not bound > 0:
            raise ConfigError(
                f"--goodput is '{text}', expected NAME:MILLISECONDS such as ttft:1000 (names: {', '.join(known)})"
            )
        bounds[name] = bound
    return bounds
