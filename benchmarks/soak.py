"""Whether an engine leaks: `python -m benchmarks.soak`.

Two thousand mixed requests against the engine as a server drives it: short ones, long prompts, shared beginnings,
several answers at once, callers that leave at any moment, and bursts after which it is quiet. Resident memory is read
every half second; after the warm-up it must not grow. At the end every block of the KV cache must be free again, and
the first request's answer must come out as it did at the start. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from benchmarks.common import REPOSITORY, BenchmarkError, InputError, check_writable, write_text
from benchmarks.machine import environment_record, publishable
from qengine import SamplingParams
from qengine.config import EngineConfig
from qengine.engine import Engine
from qengine.errors import ConfigError, LoadError
from qengine.serving.async_engine import AsyncEngine

DEFAULT_JSON = REPOSITORY / "benchmarks" / "results" / "soak-cpu.json"
#: What resident memory may grow by, once caches and allocators are warm.
MAX_BYTES_PER_MINUTE = 2**20
#: Share of the run that warms up.
WARM_UP = 0.25
SAMPLE_SECONDS = 0.5
#: The slope is taken from so many readings, evenly spread.
_MOST_READINGS = 400
MAX_BURST = 48
CANARY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class Call:
    """One request. The caller leaves after `patience` outputs; None: never."""

    prompt: list[int]
    params: SamplingParams
    patience: int | None


@dataclass(slots=True)
class Tally:
    """What happened. `memory` holds (seconds since the start, resident bytes)."""

    num_finished: int = 0
    num_left: int = 0
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    memory: list[tuple[float, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result. Bytes and minutes; `leaked_blocks` and `canary_is_same` after the last request."""

    num_requests: int
    num_finished: int
    num_left: int
    num_prompt_tokens: int
    num_tokens: int
    minutes: float
    warm_bytes: int
    last_bytes: int
    bytes_per_minute: float
    leaked_blocks: int
    canary_is_same: bool

    @property
    def is_sound(self) -> bool:
        return self.leaked_blocks == 0 and self.canary_is_same and self.bytes_per_minute < MAX_BYTES_PER_MINUTE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, 1 if something leaked, or 2 for wrong input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parse(arguments)
    try:
        check_writable(options.json)
        engine = Engine.start(EngineConfig.from_options({"model": options.model, "max_model_len": options.context}))
        verdict, tally = asyncio.run(soak(engine, options.requests, options.seed, show_progress=True))
    except (BenchmarkError, ConfigError, LoadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return InputError.exit_code
    print(table(verdict), end="")
    command = shlex.join(["python", "-m", "benchmarks.soak", *publishable(arguments)])
    record = {
        "benchmark": "soak",
        "environment": environment_record(command),
        "verdict": asdict(verdict),
        "memory": [[round(seconds, 1), num_bytes] for seconds, num_bytes in tally.memory],
    }
    write_text(options.json, json.dumps(record) + "\n")
    return 0 if verdict.is_sound else 1


async def soak(engine: Engine, num_requests: int, seed: int, *, show_progress: bool = False) -> tuple[Verdict, Tally]:
    """Run the requests on an engine, which is shut down at the end."""
    tally = Tally()
    num_blocks = engine.num_free_blocks
    runner = AsyncEngine(engine, max_queue=num_requests)
    begin = time.perf_counter()
    try:
        canary = list(range(1, 40))
        first = await _answer(runner, canary)
        sampler = asyncio.create_task(_watch_memory(tally, begin))
        with tqdm(total=num_requests, desc="Requests", unit=" requests", disable=not show_progress) as bar:
            await _run_bursts(runner, calls(engine, num_requests, seed), tally, bar, random.Random(seed))
        sampler.cancel()
        last = await _answer(runner, canary)
    finally:
        leaked = num_blocks - await _settled_blocks(engine, num_blocks)
        runner.shutdown()
    engine.check_integrity()
    return _verdict(tally, num_requests, leaked, first == last), tally


def calls(engine: Engine, num_requests: int, seed: int) -> Iterator[Call]:
    """Mixed requests, the same for the same seed."""
    draw = random.Random(seed)
    vocab, context = engine.info.vocab_size, engine.info.max_model_len

    def ids(count: int) -> list[int]:
        return [draw.randrange(vocab) for _ in range(count)]

    shared = [ids(draw.randrange(32, max(33, context // 8))) for _ in range(6)]
    for _ in range(num_requests):
        kind = draw.random()
        if kind < 0.05:
            prompt = ids(draw.randrange(context // 4, context // 2))
        elif kind < 0.35:
            prompt = draw.choice(shared) + ids(draw.randrange(1, 16))
        else:
            prompt = ids(draw.randrange(1, 48))
        greedy, n = draw.random() < 0.5, draw.choice((1, 1, 1, 1, 3))
        params = SamplingParams(
            n=n,
            temperature=0.0 if greedy else 0.9,
            max_tokens=draw.randrange(1, 25),
            top_p=draw.choice((1.0, 0.9)),
            repetition_penalty=draw.choice((1.0, 1.1)),
            logprobs=draw.choice((None, None, 2)),
            ignore_eos=draw.random() < 0.8,
        )
        yield Call(prompt, params, draw.randrange(4) if draw.random() < 0.2 else None)


async def _run_bursts(runner: AsyncEngine, todo: Iterator[Call], tally: Tally, bar: tqdm, draw: random.Random) -> None:
    """A burst, and the next when few are left of it; now and then it is quiet in between."""
    active: set[asyncio.Task[None]] = set()
    is_over = False
    index = 0
    while active or not is_over:
        for _ in range(0 if is_over else draw.randrange(1, MAX_BURST)):
            call = next(todo, None)
            if call is None:
                is_over = True
                break
            active.add(asyncio.create_task(_run_call(runner, call, f"soak-{index}", tally)))
            index += 1
        few = draw.randrange(0, MAX_BURST // 2)
        while active and (is_over or len(active) > few):
            done, active = await asyncio.wait(active, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            bar.update(len(done))
        if draw.random() < 0.1:
            await asyncio.sleep(0.2)


async def _run_call(runner: AsyncEngine, call: Call, name: str, tally: Tally) -> None:
    tally.num_prompt_tokens += len(call.prompt)
    output = None
    if call.patience == 0:
        # The caller leaves while the request waits or its prompt is computed.
        stream = runner.generate(call.prompt, call.params, name)
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await stream.aclose()
        tally.num_left += 1
        return
    async with aclosing(runner.generate(call.prompt, call.params, name)) as stream:
        count = 0
        async for output in stream:
            count += 1
            if count == call.patience and not output.finished:
                break
    assert output is not None, "a request ends in an output or an error"
    tally.num_tokens += sum(len(choice.token_ids) for choice in output.outputs)
    tally.num_finished += output.finished
    tally.num_left += not output.finished


async def _answer(runner: AsyncEngine, prompt: list[int]) -> tuple[int, ...]:
    outputs = [output async for output in runner.generate(prompt, CANARY, f"canary-{time.monotonic_ns()}")]
    return tuple(outputs[-1].outputs[0].token_ids)


async def _settled_blocks(engine: Engine, expected: int) -> int:
    """Free blocks once the engine has dropped what nobody waits for; blocks kept for prefixes count as free."""
    deadline = time.monotonic() + 10
    while engine.num_free_blocks != expected and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    return engine.num_free_blocks


async def _watch_memory(tally: Tally, begin: float) -> None:
    while True:
        tally.memory.append((time.perf_counter() - begin, resident_bytes()))
        await asyncio.sleep(SAMPLE_SECONDS)


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth_per_minute(memory: Sequence[tuple[float, int]]) -> float:
    """Bytes per minute that (seconds, bytes) rise by: the median slope of all pairs (Theil 1950, Sen 1968).

    A steady leak shows however slow; an allocator that takes one more segment and keeps it does not count.
    """
    readings = memory[:: max(1, len(memory) // _MOST_READINGS)]
    slopes = [(b - a) / (t - s) for (s, a), (t, b) in itertools.combinations(readings, 2) if t > s]
    return 60 * statistics.median(slopes) if slopes else 0.0


def _verdict(tally: Tally, num_requests: int, leaked: int, canary_is_same: bool) -> Verdict:
    warm = tally.memory[int(len(tally.memory) * WARM_UP) :]
    return Verdict(
        num_requests=num_requests,
        num_finished=tally.num_finished,
        num_left=tally.num_left,
        num_prompt_tokens=tally.num_prompt_tokens,
        num_tokens=tally.num_tokens,
        minutes=tally.memory[-1][0] / 60,
        warm_bytes=warm[0][1],
        last_bytes=warm[-1][1],
        bytes_per_minute=growth_per_minute(warm),
        leaked_blocks=leaked,
        canary_is_same=canary_is_same,
    )


def table(verdict: Verdict) -> str:
    """The verdict for people."""
    rows = [
        ("requests", f"{verdict.num_requests}: {verdict.num_finished} finished, {verdict.num_left} left by the caller"),
        ("tokens", f"{verdict.num_prompt_tokens} of prompts, {verdict.num_tokens} generated"),
        ("time", f"{verdict.minutes:.1f} min"),
        ("memory", f"{verdict.warm_bytes / 2**20:.1f} MiB once warm, {verdict.last_bytes / 2**20:.1f} MiB at the end"),
        ("growth", f"{verdict.bytes_per_minute / 2**20:+.2f} MiB a minute (below {MAX_BYTES_PER_MINUTE / 2**20:g})"),
        ("blocks", "all free" if verdict.leaked_blocks == 0 else f"{verdict.leaked_blocks} leaked"),
        ("canary", "the same answer as at the start" if verdict.canary_is_same else "another answer than at the start"),
        ("verdict", "sound" if verdict.is_sound else "NOT sound"),
    ]
    return "".join(f"  {label:<9} {text}\n" for label, text in rows)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description="Does an engine leak?")
    parser.add_argument("--model", help="a folder, a .gguf file or a hub id (the bundled model)")
    parser.add_argument("--requests", type=int, default=2000, metavar="N", help="how many (%(default)s)")
    parser.add_argument("--context", type=int, default=2048, metavar="TOKENS", help="max_model_len (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="other requests (%(default)s)")
    parser.add_argument("--json", type=Path, default=DEFAULT_JSON, metavar="FILE", help="results (%(default)s)")
    options = parser.parse_args(argv)
    if options.requests < 1 or options.context < 64:
        parser.error("--requests must be 1 or more, and --context 64 or more")
    return options


if __name__ == "__main__":
    sys.exit(main())
