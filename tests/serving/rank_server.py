"""A real `qengine serve` process on a free port with a model in several ranks, and what the kernel says of them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.waiting import wait_until

ROOT = Path(__file__).parent.parent.parent
FIXTURE = str(ROOT / "tests" / "fixtures" / "llama-awq-g64")
START_SECONDS = 90.0
STREAM_SECONDS = 60.0
#: Sent with every request, whether or not the server asks for it.
KEY = "a-secret-key"
HEADERS = {"Authorization": f"Bearer {KEY}"}
#: In /proc/net/tcp: a socket's state, and 127.0.0.1.
_LISTENS, LOOPBACK = "0A", "0100007F"


def spoil(file: Path, tensor: str, index: int = 0) -> None:
    """Make one 16-bit number of a tensor in a safetensors file NaN."""
    content = bytearray(file.read_bytes())
    header_len = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_len])
    assert header[tensor]["dtype"] in ("F16", "BF16")
    first = 8 + header_len + header[tensor]["data_offsets"][0] + 2 * index
    content[first : first + 2] = b"\xff\xff"
    file.write_bytes(content)


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):
                after_name = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(after_name[1]) == pid:
                    found.append(int(folder.name))
    return sorted(found)


def own_ranks() -> list[int]:
    """This process's children that are ranks; libraries have helpers of their own, which live as long as it does."""
    commands = {pid: Path(f"/proc/{pid}/cmdline") for pid in children(os.getpid())}
    return [pid for pid, command in commands.items() if b"rank" in command.read_bytes()]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def listening_addresses(pid: int) -> set[str]:
    """The addresses on which a process takes connections, as the kernel writes them."""
    files = Path(f"/proc/{pid}/fd")
    sockets = {os.readlink(file) for file in files.iterdir()}
    found = set()
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = row.split()
            if state == _LISTENS and f"socket:[{rest[5]}]" in sockets:
                found.add(local.partition(":")[0])
    return found


@dataclass
class RankServer:
    """A server that is ready."""

    process: subprocess.Popen[str]
    url: str
    ranks: list[int]
    errors: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def health(self) -> int:
        return httpx.get(self.url + "/health", timeout=STREAM_SECONDS).status_code

    def complete(self, **body: Any) -> httpx.Response:
        content = {"model": FIXTURE, "prompt": "The class", "temperature": 0, "max_tokens": 8, **body}
        return httpx.post(self.url + "/v1/completions", json=content, headers=HEADERS, timeout=STREAM_SECONDS)

    def assert_gone(self, seconds: float) -> int:
        """Wait for the end of the server; nothing of it is left. Returns the exit code."""
        code = self.process.wait(seconds)
        wait_until(lambda: not any(is_alive(pid) for pid in self.ranks))
        with socket.create_server(("127.0.0.1", self.port)):
            pass
        return code


@contextmanager
def rank_server(*flags: str, num_ranks: int = 2) -> Iterator[RankServer]:
    """`qengine serve FIXTURE --device cpu FLAGS`, killed at the end if need be."""
    words = [sys.executable, "-m", "qengine", "serve", FIXTURE, "--device", "cpu", "--port", "0", *flags]
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True)
    reader.start()
    watchdog = threading.Timer(START_SECONDS, process.kill)
    watchdog.start()
    ranks: list[int] = []
    try:
        printed = ""
        while (found := re.search(r"address +(http://\S+)", printed)) is None:
            line = process.stdout.readline()
            assert line, f"the server did not start: {''.join(errors)}"
            printed += line
        watchdog.cancel()
        ranks = children(process.pid)
        assert len(ranks) == num_ranks
        yield RankServer(process, found[1], ranks, errors)
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        for pid in filter(is_alive, ranks):
            os.kill(pid, signal.SIGKILL)
        reader.join(5)
        process.stdout.close()
