"""Links: a rank's place in a model that several share, and its connections to the others.

Ranks are numbered stage by stage: rank = stage x tensor-parallel size + place within the stage. All ranks of a stage
share each of its layers; ranks of the same place in neighbouring stages hand activations on. Invariant: what a rank
owns follows from the model and the sizes alone. The one place where a transport is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from qengine.config import ParallelConfig
from qengine.errors import TransportError
from qengine.parallel.distributed import connect
from qengine.parallel.group import TPGroup
from qengine.parallel.host_staged import HostStagedTransport
from qengine.parallel.rendezvous import Rendezvous
from qengine.parallel.seats import Seat
from qengine.parallel.split import stage_layers
from qengine.parallel.timed import TimedTransport
from qengine.parallel.transport import SingleTransport, Transport
from qengine.runtime.opening import OpenedHeaders, split_opened


@dataclass(frozen=True, slots=True)
class Links:
    """One rank among others; alone by default.

    Attributes:
        group: of the ranks that share this stage's layers.
        pipe: between the stages, by their numbers.
        layers: of this stage; None for all.
    """

    group: TPGroup = field(default_factory=TPGroup.single)
    pipe: Transport = field(default_factory=SingleTransport)
    layers: range | None = None

    @property
    def is_first(self) -> bool:
        """Whether this stage begins with token ids."""
        return self.pipe.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage ends with logits."""
        return self.pipe.rank == self.pipe.size - 1

    @property
    def samples(self) -> bool:
        """Whether this rank draws the tokens. One does: whatever it draws is the answer."""
        return self.is_last and self.group.rank == 0

    @property
    def collective_seconds(self) -> float | None:
        """Spent so far in sums and gathers over this stage's ranks; None where the host cannot tell."""
        transport = self.group.transport
        return transport.seconds if isinstance(transport, TimedTransport) else None

    def close(self) -> None:
        """Leave the others."""
        self.group.transport.close()
        self.pipe.close()


def check_split(parallel: ParallelConfig, opened: OpenedHeaders) -> None:
    """Refuse sizes that leave a rank without a part of the model.

    Raises:
        ConfigError: with the reason.
    """
    stage_layers(opened.config.num_layers, parallel.pipeline_parallel_size)
    split_opened(opened, parallel.tensor_parallel_size)


def connect_links(
    parallel: ParallelConfig,
    rank: int,
    opened: OpenedHeaders,
    device: torch.device,
    rendezvous: str,
    limit_s: float,
    layers: range | None = None,
    shares: Sequence[float] | None = None,
    seats: tuple[str | None, str | None] = (None, None),
) -> Links:
    """Meet the other ranks of this machine; every rank calls it with the same arguments but `rank`, `device`, `seats`,
    and `layers` and `shares`, which are those of its stage.

    Args:
        rendezvous: path of a file that is empty or does not exist yet; no port is opened to meet.
        limit_s: seconds that the others may take to come, and a call to complete.
        layers: of this stage, as the plan says; None for all.
        shares: as the plan says; how unlike ranks share every layer of this stage.
        seats: for tensors through host memory, of the stage's ranks and between the stages.

    Raises:
        ConfigError: the model cannot be split like that. TransportError: the others do not come.
    """
    tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    stage, place = divmod(rank, tp)
    of_stage, of_pipe = parallel.stage_ranks(stage), parallel.pipe_ranks(place)
    met = Rendezvous(rendezvous, tp * pp)

    def meet(name: str, ranks: range, seat: str | None) -> Transport:
        if len(ranks) == 1:
            return SingleTransport()
        if seat is not None:
            return HostStagedTransport(Seat.from_text(seat), limit_s)
        return choose_transport(device, met, name, ranks.index(rank), ranks, limit_s)

    split = split_opened(opened, tp, shares) if tp > 1 else None
    shared = meet(f"stage{stage}", of_stage, seats[0])
    # A GPU's collectives are only queued when their call returns.
    group = TPGroup(TimedTransport(shared) if tp > 1 and device.type == "cpu" else shared, split)
    pipe = meet(f"pipe{place}", of_pipe, seats[1])
    for transport in (group.transport, pipe):
        _greet(transport, device)
    _greet_neighbours(pipe, device)
    return Links(group, pipe, layers)


def _greet(transport: Transport, device: torch.device) -> None:
    """The first call, which makes the connections; a rank that cannot be reached shows here and not in a step."""
    total = transport.all_reduce(torch.ones(1, device=device))
    if total.item() != transport.size:
        raise TransportError(f"{transport.size} ranks that add up ones find {total.item():g}")


def _greet_neighbours(pipe: Transport, device: torch.device) -> None:
    """The first number down a pipeline: NCCL connects two ranks when they first send, and no step comes that early."""
    count = torch.zeros(1, device=device)
    if pipe.rank > 0:
        count = pipe.receive(count, pipe.rank - 1)
    if pipe.rank < pipe.size - 1:
        pipe.send(count + 1, pipe.rank + 1)
    if count.item() != pipe.rank:
        raise TransportError(f"stage {pipe.rank} is told that {count.item():g} are before it")


def choose_transport(
    device: torch.device, met: Rendezvous, name: str, place: int, ranks: Sequence[int], limit_s: float
) -> Transport:
    """What carries tensors in the group `name` on devices like this: NCCL between GPUs, gloo between CPUs.

    Args:
        place: this rank's, among `ranks`.
        ranks: of the group, by their numbers in the model.
    """
    backend: Literal["nccl", "gloo"] = "nccl" if device.type == "cuda" else "gloo"
    return connect(backend, met.place(name), place, len(ranks), limit_s, ranks)
