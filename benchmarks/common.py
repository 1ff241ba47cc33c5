"""What every benchmark shares: the workload, a reading's spread, errors, and how workers talk to their parent.

Invariant: imports nothing heavy, so the parent process stays small and its children's peak memory is their own
(on Linux a child's peak starts at the size of the process that forked it).
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

REPOSITORY = Path(__file__).resolve().parent.parent
#: The prompt of the start-up test, given as text so that every engine loads its tokenizer too.
FIRST_TOKEN_PROMPT = "Explain in a few sentences how a computer runs a program that was written in Python."
#: Key of the reason in a worker's answer when it failed in an expected way.
WORKER_ERROR = "error"


class BenchmarkError(Exception):
    """A benchmark cannot go on. `exit_code` is 2 when the input is to blame, 1 when a measurement failed."""

    exit_code = 1


class InputError(BenchmarkError):
    """An option, a path or a model is wrong."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Workload:
    """What every engine is asked to do. Lengths in tokens.

    Attributes:
        threads: CPU threads.
        prompt_tokens: length of the prompt whose processing is timed.
        decode_prompt_tokens: length of the prompts in front of the timed decoding.
        decode_tokens: decode steps timed; each step gives one token per sequence.
        batches: numbers of sequences to decode at once.
        context_tokens: context that engines reserve in the start-up test.
        runs: rounds, each in fresh processes.
    """

    threads: int
    prompt_tokens: int = 512
    decode_prompt_tokens: int = 32
    decode_tokens: int = 128
    batches: tuple[int, ...] = (1, 16)
    context_tokens: int = 2048
    runs: int = 5

    @property
    def mean_decode_context(self) -> float:
        """Tokens in the KV cache of one sequence, averaged over the timed decode steps."""
        return self.decode_prompt_tokens + (self.decode_tokens + 1) / 2

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "batches": list(self.batches)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Workload:
        return cls(**{**record, "batches": tuple(record["batches"])})


@dataclass(frozen=True, slots=True)
class Spread:
    """Readings of one quantity: the median, and how far the others lie."""

    median: float
    low: float
    high: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        assert values, "a spread needs at least one reading"
        return cls(statistics.median(values), min(values), max(values), tuple(values))

    def to_json(self) -> dict[str, Any]:
        return {"median": self.median, "min": self.low, "max": self.high, "values": list(self.values)}


def random_prompt(num_tokens: int, vocab_size: int, seed: int) -> list[int]:
    """Token ids drawn evenly from the vocabulary; different seeds share no prefix worth caching."""
    draw = random.Random(seed)
    return [draw.randrange(vocab_size) for _ in range(num_tokens)]


def check_writable(path: Path) -> None:
    """Make `path`'s folder if needed and try to write there, before minutes are spent on measuring.

    Raises:
        InputError: if nothing can be written there.
    """
    if path.is_dir():
        raise InputError(f"'{path}' is a folder; give the name of a file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent), open(path if path.exists() else os.devnull, "a"):
            pass
    except OSError as error:
        raise InputError(f"cannot write '{path}': {error.strerror or error}; choose another path") from error


def write_text(path: Path, text: str) -> None:
    """Write the whole file or leave the old one: a benchmark that is stopped never leaves half a result.

    Raises:
        InputError: if the path cannot be written.
    """
    check_writable(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(f"cannot write '{path}': {error.strerror or error}; choose another path") from error


def read_results(path: Path, check: Callable[[Any], Mapping[str, Any]]) -> Mapping[str, Any]:
    """A results file's record, as `check` accepts it.

    Raises:
        InputError: if it cannot be read, or from `check`, with the file's name.
    """
    try:
        return check(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read '{path}': {error}") from error
    except InputError as error:
        raise InputError(f"'{path}': {error}") from error


# The worker's side


def take_stdout() -> TextIO:
    """Keep the real stdout for the answer and send everything else that prints to stderr."""
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answer


def answer(channel: TextIO, record: Mapping[str, Any]) -> None:
    """Send one JSON line to the parent, at once."""
    channel.write(json.dumps(record) + "\n")
    channel.flush()


def run_worker(
    tasks: Mapping[str, Callable[[Mapping[str, Any], TextIO], None]],
    expected: type[Exception] | tuple[type[Exception], ...],
) -> int:
    """Body of a worker's main: `worker TASK JSON-SPEC`.

    Args:
        tasks: by name, each taking the spec and the channel for its answers.
        expected: errors that a user can cause; they are answered, other errors end in a traceback.
    """
    channel = take_stdout()
    task, spec = tasks[sys.argv[1]], json.loads(sys.argv[2])
    try:
        task(spec, channel)
    except expected as error:
        answer(channel, {WORKER_ERROR: str(error)})
        return InputError.exit_code
    return 0
