"""A rank that computes nothing and answers at length: `python -m tests.runtime.chatty_rank` and what a rank is given.

Its answers are larger than a socket holds, and like any rank it reads no further order before one has been taken. Rank
r says that it spent r + 1 seconds in collectives.
"""

from __future__ import annotations

import socket
import sys

from qengine.runtime.channel import Channel, ChannelClosedError
from qengine.runtime.loader import LoadTimes
from qengine.runtime.messages import (
    Joined,
    Loaded,
    Opened,
    Report,
    Result,
    Spent,
    Start,
    Step,
    Stop,
    decode_order,
    encode,
)

ANSWER_BYTES = 2**21


def serve(channel: Channel) -> None:
    def say(report: Report) -> None:
        channel.send(encode(report))

    start = decode_order(channel.receive())
    assert isinstance(start, Start)
    for report in (Opened(), Joined(), Loaded(None, 0, LoadTimes(0, 0.0, 0.0, 0.0))):
        say(report)
    while not isinstance(order := decode_order(channel.receive()), Stop):
        if isinstance(order, Step):
            say(Spent(start.rank + 1.0))
            say(Result((), pooled={0: bytes(ANSWER_BYTES)}))


def main(descriptor: int) -> None:
    try:
        serve(Channel(socket.socket(fileno=descriptor)))
    except ChannelClosedError:
        return


if __name__ == "__main__":
    main(int(sys.argv[1]))
