"""Ranks and probes of tests, forked from a process that has torch: to import it is most of what they would do.

Tests start some hundred and fifty of them. While `quick_start` is on, `subprocess.Popen` has the modules below forked
by `tests.fork_server`. Invariant: such a process is what Popen would have started, a child of this one with its command
line, descriptors, environment and session, only that torch is there before its first line. What people start themselves
is never forked, nor what measures its own memory or time.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest.mock import patch

from tests.fork_server import LARGEST_REQUEST

MODULES = frozenset(
    {
        "qengine.runtime.rank",
        "qengine.parallel.peer_probe",
        "tests.benchmarks.tiny_rank",
        "tests.parallel.faulty_probe",
        "tests.parallel.staged_rank",
        "tests.runtime.chatty_rank",
        "tests.runtime.failing_rank",
        "tests.runtime.stalled_rank",
    }
)
#: Python and the libraries read these once, when they are loaded: a server answers for one set of them.
_READ_AT_START = ("PYTHON", "LD_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "TORCH", "TRITON", "CUDA", "MALLOC_")
#: Arguments of `Popen._execute_child` with which a process can be forked as asked.
_PLAIN = {"preexec_fn": None, "shell": False, "close_fds": True, "cwd": None, "executable": None, "umask": -1}
_PADDING = " " * 1000
_MOST_SERVERS = 4
_PR_SET_CHILD_SUBREAPER = 36


class ForkServer:
    """A process that forks others, with one set of the variables that are read at its start.

    Args:
        pair: connected sockets. Both stay open: tests count the descriptors of this process.
    """

    def __init__(self, environment: Mapping[str, str], pair: tuple[socket.socket, socket.socket]) -> None:
        self._lock = threading.Lock()
        self._control, self._theirs = pair
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", str(self._theirs.fileno()), _PADDING],
            stdin=subprocess.DEVNULL, pass_fds=[self._theirs.fileno()], env=environment, start_new_session=True,
        )  # fmt: skip

    def fork(self, request: Mapping[str, Any], descriptors: Sequence[int]) -> int:
        """The id of a new child of this process."""
        text = json.dumps(request).encode()
        assert len(text) <= LARGEST_REQUEST
        with self._lock, _orphans_are_ours():
            socket.send_fds(self._control, [text], descriptors)
            return int(self._control.recv(32))

    def close(self) -> None:
        self._control.close()
        self._theirs.close()
        self._process.wait()


class ForkServers:
    """A server for each set of variables that is asked for, as long as there are sockets; in one folder."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folder = os.getcwd()
        self._pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(_MOST_SERVERS)]
        self._servers: dict[frozenset[tuple[str, str]], ForkServer] = {}

    def find(self, environment: Mapping[str, str]) -> ForkServer | None:
        """The server for an environment; None if there is none."""
        kind = frozenset(item for item in environment.items() if item[0].startswith(_READ_AT_START))
        with self._lock:
            if os.getcwd() == self._folder and kind not in self._servers and self._pairs:
                self._servers[kind] = ForkServer(environment, self._pairs.pop())
            return self._servers.get(kind) if os.getcwd() == self._folder else None

    def close(self) -> None:
        for server in self._servers.values():
            server.close()
        for ours, theirs in self._pairs:
            ours.close()
            theirs.close()


@contextlib.contextmanager
def quick_start() -> Iterator[None]:
    """Fork the modules above while the block runs, where this is Linux."""
    if sys.platform != "linux":
        yield
        return
    servers = ForkServers()
    try:
        with patch.object(subprocess.Popen, "_execute_child", _forking(servers)):
            yield
    finally:
        servers.close()


def _forking(servers: ForkServers) -> Callable[..., None]:
    """`Popen._execute_child`, which forks what can be forked."""
    real = vars(subprocess.Popen)["_execute_child"]
    signature = inspect.signature(real)

    def execute_child(process: Any, *arguments: Any) -> None:
        asked = signature.bind(process, *arguments).arguments
        environment = dict(os.environ if asked["env"] is None else asked["env"])
        server = servers.find(environment) if _can_be_forked(asked) else None
        if server is None:
            real(process, *arguments)
            return
        request = {
            "words": asked["args"][2:],
            "environment": environment,
            "pass_fds": list(asked["pass_fds"]),
            "start_new_session": asked["start_new_session"],
        }
        files = [asked["p2cread"], asked["c2pwrite"], asked["errwrite"]]
        own = [place if file == -1 else file for place, file in enumerate(files)]
        process.pid = server.fork(request, [*own, *asked["pass_fds"]])
        process._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        process._close_pipe_fds(*(asked[pipe] for pipe in pipes))

    return execute_child


def _can_be_forked(asked: Mapping[str, Any]) -> bool:
    command = asked["args"]
    if isinstance(command, str) or list(command[:2]) != [sys.executable, "-m"] or command[2] not in MODULES:
        return False
    return all(asked[name] == value for name, value in _PLAIN.items())


@contextlib.contextmanager
def _orphans_are_ours() -> Iterator[None]:
    """What loses its parent below this process becomes its child while the block runs."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0)
