"""How fast the engine alone is: one prompt, and decoding a batch, over random token ids.

`qengine bench offline` shows these figures for one model; the repository's `benchmarks.offline` holds the same readings
against other engines, in fresh processes and in turns. Invariant: what is timed is steps of the engine with every
sequence running; a reading that something else got into, such as the prefix cache, is an error.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from qengine.bench.load import random_ids
from qengine.engine import Engine
from qengine.errors import QEngineError
from qengine.request import SamplingParams

#: Steps before the timed ones, and room for the sequences that start decoding while others still read their prompt.
WARM_UP_STEPS = 8
_SPARE_TOKENS = 64


class BenchError(QEngineError):
    """A reading is not what it should be."""


def time_prompt(engine: Engine, num_tokens: int, seed: int) -> float:
    """Seconds from adding a prompt to its first token. Raises BenchError."""
    prompt = random_ids(num_tokens, engine.info.vocab_size, seed)
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    pending = engine.make_request(f"prompt-{seed}", prompt, params)
    begin = time.perf_counter()
    engine.add(pending)
    outputs = []
    while engine.has_unfinished:
        outputs = engine.step()
    seconds = time.perf_counter() - begin
    if outputs[0].num_cached_tokens:
        raise BenchError(f"{outputs[0].num_cached_tokens} prompt tokens came from the prefix cache")
    return seconds


def time_decode(engine: Engine, *, batch: int, prompt_len: int, num_steps: int, seed: int) -> float:
    """Seconds of `num_steps` steps that give each of `batch` sequences one token.

    Raises:
        BenchError: if some step served fewer sequences, as with a KV cache too small for all of them.
    """
    params = SamplingParams(temperature=0.0, max_tokens=num_steps + _SPARE_TOKENS + batch, ignore_eos=True)
    lengths: dict[str, int] = {}
    for index in range(batch):
        prompt = random_ids(prompt_len, engine.info.vocab_size, seed + index)
        engine.add(engine.make_request(f"decode-{batch}-{seed + index}", prompt, params))
    while len(lengths) < batch:
        _step(engine, lengths)
    before = sum(lengths.values())
    begin = time.perf_counter()
    for _ in range(num_steps):
        _step(engine, lengths)
    seconds = time.perf_counter() - begin
    num_new = sum(lengths.values()) - before
    for request_id in lengths:
        engine.abort(request_id)
    if num_new != batch * num_steps:
        raise BenchError(
            f"{num_steps} steps of {batch} sequences gave {num_new} tokens instead of {batch * num_steps}; "
            "the KV cache may be too small: use a smaller batch or fewer tokens"
        )
    return seconds


def _step(engine: Engine, lengths: dict[str, int]) -> None:
    for output in engine.step():
        if output.error is not None:
            raise BenchError(f"request {output.request_id} failed: {output.error}")
        num_tokens = len(output.outputs[0].token_ids)
        if num_tokens:
            lengths[output.request_id] = num_tokens


def measure(
    engine: Engine,
    *,
    batches: Sequence[int],
    input_len: int,
    output_len: int,
    num_runs: int,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Tokens per second of a prompt and of decoding at each batch size: the median of the runs, and all of them.

    Args:
        say: is told each figure as it is there.
    """
    seeds = iter(range(0, 10**9, 10_000))

    def readings(label: str, num_tokens: int, read: Callable[..., float]) -> dict[str, Any]:
        speeds = [num_tokens / read(seed=next(seeds)) for _ in range(num_runs)]
        median = statistics.median(speeds)
        say(f"{label:<28}{median:>10.1f} tok/s   {min(speeds):.1f} to {max(speeds):.1f}")
        return {"median": median, "values": speeds}

    time_prompt(engine, input_len, next(seeds))
    prompt = readings(f"prompt, {input_len} tokens", input_len, partial(time_prompt, engine, input_len))
    decoded = {}
    for batch in batches:
        timed = partial(time_decode, engine, batch=batch, prompt_len=input_len)
        timed(num_steps=WARM_UP_STEPS, seed=next(seeds))
        label = f"decode, {batch} sequence{'s' if batch > 1 else ''}"
        decoded[batch] = readings(label, batch * output_len, partial(timed, num_steps=output_len))
    return {"prompt_tokens_per_s": prompt, "decode_tokens_per_s": decoded}
