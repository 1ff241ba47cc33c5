"""How soon a server answers the smallest question: GET /health on one connection, from a process of its own.

    python -m benchmarks.serving.probe HOST PORT INTERVAL-SECONDS

Asks on a fixed beat until its input ends, then prints the seconds of all answers as a list. Each counts from when its
question was due, and beats that go by while one waits count as questions answered with it: a stall is seen by every
question that would have fallen into it, and leaves no queue behind. What it reports is an upper bound of how long the
server's event loop was busy with something else: the answer itself and this process are in it.
"""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.common import BenchmarkError
from benchmarks.process import child_environment
from benchmarks.serving.servers import Server, pinned

INTERVAL_S = 0.02
_READ_BYTES = 65536


@contextmanager
def watched(server: Server, cpu: int) -> Iterator[list[float]]:
    """Ask for as long as the context is open; the list is filled when it closes. Raises BenchmarkError."""
    address = server.address
    command = [sys.executable, "-m", "benchmarks.serving.probe", address.host, str(address.port), str(INTERVAL_S)]
    with pinned(cpu):
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=child_environment(1), text=True
        )
    seconds: list[float] = []
    try:
        assert process.stdout is not None
        process.stdout.readline()  # It is connected.
        yield seconds
        printed, _ = process.communicate("")
        if process.returncode:
            raise BenchmarkError(f"the probe of {server.name} ended with code {process.returncode}")
        seconds.extend(json.loads(printed))
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def main() -> int:
    host, port, interval_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    question = f"GET /health HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode()
    seconds: list[float] = []
    with socket.create_connection((host, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        print("ready", flush=True)
        due = time.perf_counter()
        is_over = False
        while not is_over:  # One at least, however soon it is over.
            _ask(connection, question)
            answered = time.perf_counter()
            while due <= answered:  # Also the beats that went by meanwhile: they would have waited as long at least.
                seconds.append(answered - due)
                due += interval_s
            is_over = bool(select.select([sys.stdin], [], [], max(0.0, due - time.perf_counter()))[0])
    print(json.dumps(seconds))
    return 0


def _ask(connection: socket.socket, question: bytes) -> None:
    """One question and its whole answer: the body of /health follows its head and is a single short object."""
    connection.sendall(question)
    received = b""
    while not received.endswith(b"}"):
        data = connection.recv(_READ_BYTES)
        if not data:
            raise ConnectionError("the server closed the connection")
        received += data
    if b" 200 " not in received.partition(b"\r\n")[0]:
        raise ConnectionError("the server is not healthy")


if __name__ == "__main__":
    sys.exit(main())
