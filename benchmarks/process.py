"""Child processes of a benchmark: run one to its end, with the time of its first output and its peak memory.

Invariant: when `run_child` returns or raises, Ctrl-C included, the child and everything it started are gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any

from benchmarks.common import REPOSITORY, WORKER_ERROR, BenchmarkError, InputError

_CHUNK = 65536
_POLL_SECONDS = 0.005
_TERMINATED = 143


@contextmanager
def signals_raise() -> Iterator[None]:
    """Let SIGTERM and SIGINT unwind the stack, so that children are ended; a job in the background ignores SIGINT."""
    handlers: dict[signal.Signals, Callable[[int, FrameType | None], Any]] = {
        signal.SIGTERM: _terminate,
        signal.SIGINT: signal.default_int_handler,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(_TERMINATED)


@dataclass(frozen=True, slots=True)
class ChildResult:
    """How a child went. Times in seconds from just before it was spawned."""

    stdout: str
    stderr: str
    seconds: float
    first_output_seconds: float
    peak_rss_bytes: int


def child_environment(threads: int, **more: str) -> dict[str, str]:
    """Our environment, with the thread count of every common library, no GPU and no network."""
    variables = {**os.environ}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        variables[name] = str(threads)
    variables.update(CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")
    folders = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables["PYTHONPATH"] = os.pathsep.join(folders)
    return {**variables, **more}


def run_child(
    command: Sequence[str], environment: Mapping[str, str], timeout_s: float, allowed_codes: Sequence[int] = (0,)
) -> ChildResult:
    """Run a command to its end.

    Raises:
        BenchmarkError: if it cannot be started, fails, or takes longer than `timeout_s`.
    """
    name = os.path.basename(command[0]) if command[0] != sys.executable else command[2]
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(environment),
                start_new_session=True,
            )
        except OSError as error:
            raise BenchmarkError(f"cannot start {command[0]}: {error.strerror or error}") from error
        try:
            stdout, first_output = _read_all(process, started + timeout_s)
            _await_exit(process, started + timeout_s)
        except TimeoutError as error:
            raise BenchmarkError(f"{name} did not finish in {timeout_s:.0f} s; see --timeout") from error
        finally:
            peak_rss_bytes = _end(process)
        seconds = time.perf_counter() - started
        stderr = _tail(errors)
    if process.returncode not in allowed_codes:
        raise BenchmarkError(_failure(name, process.returncode, stdout, stderr))
    return ChildResult(stdout, stderr, seconds, first_output - started, peak_rss_bytes)


def run_python(
    module: str, task: str, spec: Mapping[str, Any], environment: Mapping[str, str], timeout_s: float
) -> tuple[dict[str, Any], ChildResult]:
    """Run a task of a worker module in a fresh Python; returns the last line of its answer.

    Raises:
        InputError: what the worker says about its input; BenchmarkError: anything else that went wrong.
    """
    command = [sys.executable, "-m", module, task, json.dumps(dict(spec))]
    result = run_child(command, environment, timeout_s, allowed_codes=(0, InputError.exit_code))
    lines = result.stdout.splitlines()
    if not lines:
        raise BenchmarkError(_failure(module, InputError.exit_code, "", result.stderr))
    record: dict[str, Any] = json.loads(lines[-1])
    if WORKER_ERROR in record:
        raise InputError(record[WORKER_ERROR])
    return record, result


def _read_all(process: subprocess.Popen[bytes], deadline: float) -> tuple[str, float]:
    """Everything the child prints, and when the first byte came (now, if none did)."""
    assert process.stdout is not None
    chunks: list[bytes] = []
    first = None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, deadline - time.perf_counter())):
                raise TimeoutError
            chunk = os.read(process.stdout.fileno(), _CHUNK)
            if not chunk:
                break
            first = first or time.perf_counter()
            chunks.append(chunk)
    return b"".join(chunks).decode("utf-8", errors="replace"), first or time.perf_counter()


def _await_exit(process: subprocess.Popen[bytes], deadline: float) -> None:
    """Wait until the child has ended, but leave it unreaped: its process group stays ours to end."""
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.perf_counter() > deadline:
            raise TimeoutError
        time.sleep(_POLL_SECONDS)


def _end(process: subprocess.Popen[bytes]) -> int:
    """End the child's whole session; returns the child's peak resident memory in bytes, which only wait4 tells."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.stdout is not None:
        process.stdout.close()
    return usage.ru_maxrss * 1024


def _tail(file: IO[bytes], num_bytes: int = _CHUNK) -> str:
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - num_bytes))
    return file.read().decode("utf-8", errors="replace")


def _failure(name: str, returncode: int, stdout: str, stderr: str) -> str:
    lines = stderr.strip().splitlines()[-8:]
    ended = f"was killed by signal {-returncode}" if returncode < 0 else f"ended with exit code {returncode}"
    return "\n    ".join([f"{name} {ended}:", *(lines or stdout.strip().splitlines()[-8:] or ["(it printed nothing)"])])
