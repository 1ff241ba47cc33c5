"""`python -m qengine.parallel.peer_probe SPEC`: one rank of the check of whether cards reach each other's memory.

It may hang, crash or be right, and is asked in a process of its own for that reason; `peer_check` starts and ends it.
Every rank copies between its card and those of higher ranks, both ways, and compares bytes; then all ranks add up known
numbers. SPEC is JSON with the fields of `Spec`. The answers are JSON lines: {"stage": name} when a stage begins, the
last of them DONE, and {"fault": text} in its place when something came out wrong. Then it waits to be ended, since the
others may still read what it holds; it ends by itself when its standard input does, and after LIFE_SECONDS.

The checks see cards through `PeerPath` alone, so a test can put a path in their place that loses, changes or stalls.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from qengine.errors import QEngineError

#: Single bytes, odd lengths, a page, and what takes a card's copy engines several transfers.
COPY_SIZES = (1, 255, 4096, 65537, 2**20, 2**24 + 1)
#: Elements of sums: of a decode step, an odd number, and of a long prompt.
SUM_SIZES = (1, 8192, 65537, 2**22)
ROUNDS = 3
#: The last stage.
DONE = "done"
#: Longer than whoever starts a probe lets it run.
LIFE_SECONDS = 300


class PeerFaultError(QEngineError):
    """Data did not arrive as it was sent."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What one rank of the probe is told.

    Attributes:
        rank: of this process.
        devices: of all ranks, as torch names them.
        meeting_file: path of an empty file, by which the ranks find each other.
        copies: whether copies are checked, or sums alone.
    """

    rank: int
    devices: tuple[str, ...]
    meeting_file: str
    copies: bool

    def to_text(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_text(text: str) -> Spec:
        """The spec that was written."""
        record = json.loads(text)
        return Spec(**{**record, "devices": tuple(record["devices"])})


class PeerPath(Protocol):
    """The cards as one rank uses them. Tensors go in and out in host memory."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def copy(self, x: torch.Tensor, source: int, target: int) -> torch.Tensor:
        """Bytes x [n], put on one card, copied from there to another over other bytes, and fetched."""
        ...

    def connect(self) -> None:
        """Meet the other ranks."""
        ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of x [n], computed by the cards."""
        ...


class DevicePath:
    """What the engine itself uses: torch's copies between devices, and NCCL. On CPUs, which tests have, gloo."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._devices = [torch.device(name) for name in spec.devices]

    @property
    def rank(self) -> int:
        return self._spec.rank

    @property
    def size(self) -> int:
        return len(self._devices)

    def copy(self, x: torch.Tensor, source: int, target: int) -> torch.Tensor:
        arrived = (~x).to(self._devices[target])
        sent = x.to(self._devices[source])
        for index in (source, target):
            _finish(self._devices[index])
        arrived.copy_(sent)
        for index in (source, target):
            _finish(self._devices[index])
        return arrived.cpu()

    def connect(self) -> None:
        device = self._devices[self.rank]
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{self._spec.meeting_file}",
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=LIFE_SECONDS),
        )

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        on_device = x.to(self._devices[self.rank], copy=True)
        dist.all_reduce(on_device)
        return on_device.cpu()


def check(path: PeerPath, *, copies: bool, begin_stage: Callable[[str], None]) -> None:
    """Check one rank's part; every rank must.

    Raises:
        PeerFaultError: something did not arrive as it was sent; says what, between which cards.
    """
    if copies:
        begin_stage("copies")
        check_copies(path)
    begin_stage("connecting")
    path.connect()
    begin_stage("sums")
    check_sums(path)


def check_copies(path: PeerPath) -> None:
    """Copies between this rank's card and those of higher ranks, both ways, again and again."""
    for other in range(path.rank + 1, path.size):
        for num_bytes in COPY_SIZES:
            for sent in patterns(num_bytes):
                for source, target in ((path.rank, other), (other, path.rank)):
                    _compare(sent, path.copy(sent, source, target), f"copies from card {source} to card {target}")


def check_sums(path: PeerPath) -> None:
    """Sums of small whole numbers, which are exact in 16 bits too."""
    for count in SUM_SIZES:
        for dtype in (torch.float32, torch.float16):
            steps = torch.arange(count)
            parts = [(steps * 7 + rank * 13) % 97 for rank in range(path.size)]
            expected = torch.stack(parts).sum(0).to(dtype)
            for _ in range(ROUNDS):
                found = path.all_reduce(parts[path.rank].to(dtype))
                _compare(expected, found, f"sums over {path.size} cards, seen by card {path.rank}")


def patterns(num_bytes: int) -> Iterator[torch.Tensor]:
    """Bytes [num_bytes] that look random; the first of them hold no zero, which is what lost data looks like."""
    base = torch.randint(1, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(num_bytes))
    for number in range(ROUNDS):
        # uint8 wraps around.
        yield base + 85 * number


def _compare(expected: torch.Tensor, found: torch.Tensor, what: str) -> None:
    if torch.equal(expected, found):
        return
    wrong = (expected != found).nonzero().view(-1)
    size = f"{len(wrong)} of {expected.numel()} {'bytes' if expected.dtype == torch.uint8 else 'numbers'}"
    if not found.any():
        raise PeerFaultError(f"{what} arrive as zeros ({size} are wrong)")
    raise PeerFaultError(f"{what} are wrong ({size}, the first at {int(wrong[0])})")


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(path: PeerPath, spec: Spec) -> None:
    """Check, answer on standard output, and wait for the end."""
    # Whoever waits for this process may be killed; a signal also ends what hangs in a library.
    signal.alarm(LIFE_SECONDS)
    try:
        check(path, copies=spec.copies, begin_stage=lambda stage: _answer({"stage": stage}))
        _answer({"stage": DONE})
    except PeerFaultError as fault:
        _answer({"fault": str(fault)})
    while os.read(sys.stdin.fileno(), 1):
        pass


def _answer(record: dict[str, str]) -> None:
    # In one system call: the process may be killed between any two.
    os.write(sys.stdout.fileno(), (json.dumps(record) + "\n").encode())


def main() -> None:
    """Check this machine's cards."""
    spec = Spec.from_text(sys.argv[1])
    run(DevicePath(spec), spec)
    # Without clean-up, which can hang too.
    os._exit(0)


if __name__ == "__main__":
    main()
