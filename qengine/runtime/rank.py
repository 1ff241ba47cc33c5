"""`python -m qengine.runtime.rank FD PID`: the command that starts a rank. Its work is `rank_service`'s.

FD is the socket to the engine, PID the engine's process. Invariant: before torch is imported, the rank ends with its
engine and ignores SIGINT: it ends when its engine says so, and lives in a session of its own, where no terminal's
Ctrl-C comes. The import goes without the collector, which takes a tenth of a rank's start. It ends without clean-up, in
which a library could hang: `rank_service` has given back what others wait for.
"""

from __future__ import annotations

import signal
import socket
import sys

from qengine.imports import import_late
from qengine.runtime.channel import Channel
from qengine.runtime.parent_death import die_with


def main() -> None:
    """Serve the engine that the command line names, and end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = open_channel(*map(int, sys.argv[1:]))
    code: int = import_late("qengine.runtime.rank_service").main(channel)
    import_late("qengine.process_end").exit_now(code)


def open_channel(descriptor: int, engine_pid: int) -> Channel:
    """The channel to the engine, in a process that ends with it from now on."""
    channel = Channel(socket.socket(fileno=descriptor))
    die_with(engine_pid, channel)
    return channel


if __name__ == "__main__":
    main()
