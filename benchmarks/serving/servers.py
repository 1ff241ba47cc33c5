"""Servers to put load on: ours and llama.cpp's, each on one core, stopped however their context ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import REPOSITORY, BenchmarkError
from benchmarks.engines.llama_cpp import link_short_names
from benchmarks.process import child_environment
from qengine.client.address import Address, parse_address
from qengine.client.api import ApiClient, ServerError

_READY_SECONDS = 180.0
_STOP_SECONDS = 40.0
_POLL_SECONDS = 0.1
_ADDRESS = re.compile(r"^\s*address\s+(http\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Cores:
    """Where things run: CPU numbers. They are the same where there is only one."""

    server: int
    load: int

    @classmethod
    def choose(cls) -> Cores:
        """The last two CPUs of those that we may use: the first one is where a kernel likes to put its interrupts."""
        usable = sorted(os.sched_getaffinity(0))
        return cls(server=usable[-1], load=usable[-2] if len(usable) > 1 else usable[-1])


@dataclass(frozen=True, slots=True)
class Server:
    """One that answers. `model` is its name for the model."""

    name: str
    address: Address
    model: str
    pid: int

    def cpu_seconds(self) -> float:
        """CPU time of the process so far, all threads together."""
        return cpu_seconds(self.pid)


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has taken, in user and kernel mode."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def pinned(cpu: int) -> Iterator[None]:
    """Have processes that start meanwhile run on `cpu` alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def own_server(cpu: int, words: Sequence[str]) -> Iterator[Server]:
    """`qengine serve` with these words of its command line, ready.

    Raises:
        BenchmarkError: it did not get ready.
    """
    command = [sys.executable, "-m", "qengine", "serve", *words, "--port", "0"]
    with _process(cpu, command, child_environment(1)) as (process, output):

        def address() -> Address | None:
            found = _ADDRESS.search(output())
            return None if found is None else parse_address(found[1])

        yield _ready(process, output, "qengine", address)


@contextmanager
def llama_server(cpu: int, binary: Path, gguf: Path, num_streams: int, context: int) -> Iterator[Server]:
    """llama.cpp's server with room for `num_streams` sequences of `context` tokens, ready. Otherwise its defaults.

    Raises:
        BenchmarkError: it did not get ready.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "--model": gguf,
        "--threads": 1,
        "--parallel": num_streams,
        "--ctx-size": num_streams * context,
        "--host": "127.0.0.1",
        "--port": port,
    }
    with tempfile.TemporaryDirectory(prefix="llama-cpp-links-") as links:
        link_short_names(binary.parent, Path(links))
        environment = {**child_environment(1), "LD_LIBRARY_PATH": f"{links}:{binary.parent}"}
        command = [str(binary), *(str(word) for option in options.items() for word in option)]
        with _process(cpu, command, environment) as (process, output):
            address = parse_address(f"http://127.0.0.1:{port}")
            yield _ready(process, output, "llama-server", lambda: address)


@contextmanager
def _process(
    cpu: int, command: Sequence[str], environment: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], str]]]:
    """A process on `cpu`, and a function that returns what it has printed."""
    with tempfile.TemporaryDirectory(prefix="serving-") as folder:
        printed = Path(folder) / "output"
        with printed.open("wb") as stream, pinned(cpu):
            process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process, lambda: printed.read_text(encoding="utf-8", errors="replace")
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _ready(
    process: subprocess.Popen[bytes], output: Callable[[], str], name: str, address: Callable[[], Address | None]
) -> Server:
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchmarkError(f"{name} ended with exit code {process.returncode}:\n{_tail(output())}")
        found = address()
        model = None if found is None else _model_name(found)
        if found is not None and model is not None:
            return Server(name, found, model, process.pid)
        time.sleep(_POLL_SECONDS)
    raise BenchmarkError(f"{name} was not ready within {_READY_SECONDS:.0f} s:\n{_tail(output())}")


def _model_name(address: Address) -> str | None:
    """What the server calls its model; None while it loads."""
    try:
        return ApiClient(address).model_names()[0]
    except ServerError:
        return None


def _tail(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-8:]) or "    (it printed nothing)"
