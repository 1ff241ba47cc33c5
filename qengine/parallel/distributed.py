"""DistTransport: tensors between ranks over torch.distributed, by gloo between CPUs and NCCL between GPUs.

It speaks to a process group as an object, so nothing in the process is shared by accident: several transports (the
ranks of a stage, the stages of a rank) live side by side, each made by `connect` or around a group that exists.

Invariant: on a CPU a call is complete when it returns, or raises TransportError within the limit. On a GPU a call is
queued on the current stream, and waits there; the group's own watchdog ends the process of a rank whose peers stay away
for longer than the limit. A transport that has failed once refuses every other call: its ranks are at different places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from qengine.errors import TransportError


class Work(Protocol):
    """A call under way."""

    def wait(self, timeout: timedelta = ...) -> bool: ...


class Group(Protocol):
    """What is needed of a process group, or of one of its backends alone."""

    def rank(self) -> int: ...

    def size(self) -> int: ...

    def allreduce(self, tensors: list[torch.Tensor]) -> Work: ...

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor]) -> Work: ...

    def send(self, tensors: list[torch.Tensor], to: int, tag: int) -> Work: ...

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> Work: ...


def connect(
    backend: Literal["gloo", "nccl"],
    store: Store,
    rank: int,
    size: int,
    limit_s: float,
    names: Sequence[int] | None = None,
) -> DistTransport:
    """Meet the other ranks at a store that all of them share, which may have no other group's keys in it.

    Args:
        store: `torch.distributed.PrefixStore` sets the groups of one store apart.
        limit_s: for the meeting and for every call after it, in seconds.
        names: by rank, its number among all ranks of the model, for errors; None where these are all of them.

    Raises:
        TransportError: if the others do not come, or this torch has no such backend.
    """
    limit = timedelta(seconds=limit_s)
    names = tuple(range(size) if names is None else names)
    made: Any
    try:
        if backend == "gloo":
            made = dist.ProcessGroupGloo(store, rank, size, limit)
        elif dist.is_nccl_available():
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            made = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            raise TransportError("this build of torch has no NCCL; see https://pytorch.org for one with CUDA")
    except RuntimeError as error:
        raise TransportError(f"{_among(rank, names)} cannot meet the others over {backend}: {error}") from error
    return DistTransport(made, limit_s, names)


def _among(rank: int, names: Sequence[int]) -> str:
    return f"rank {names[rank]} of ranks {', '.join(map(str, names))}"


class DistTransport:
    """A `Transport` over a process group. For one thread, and on a GPU for one stream.

    Args:
        group: a process group of the ranks that this transport joins, and no others.
        limit_s: the longest that a call on CPU tensors may take, in seconds.
        names: by rank, its number among all ranks of the model, for errors.
    """

    def __init__(self, group: Group, limit_s: float, names: Sequence[int]) -> None:
        self._group: Group | None = group
        self._rank = group.rank()
        self._size = group.size()
        self._names = names
        self._limit = timedelta(seconds=limit_s)
        self._dead: str | None = None

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of x of any shape, the same bits on every rank; x is overwritten and returned.

        Raises:
            TransportError: if a rank is stalled, has ended or is in another call. The transport is dead then.
        """
        assert x.is_contiguous(), "the sum is written to x, which must lie in one piece"
        self._complete("all_reduce", x, lambda group: group.allreduce([x]))
        return x

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """x [rows, widths[rank]] of every rank, side by side: [rows, sum(widths)]; raises as `all_reduce`."""
        assert len(widths) == self._size, f"{len(widths)} widths for {self._size} ranks"
        assert x.shape[1] == widths[self._rank], f"x has {x.shape[1]} columns, expected {widths[self._rank]}"
        # Backends gather parts of one shape only. Ours differ by a tile at most, so padding costs little.
        padded = torch.nn.functional.pad(x, (0, max(widths) - x.shape[1])).contiguous()
        parts = list(padded.new_empty(self._size, *padded.shape))
        self._complete("all_gather", x, lambda group: group.allgather([parts], [padded]))
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def send(self, x: torch.Tensor, to: int) -> None:
        """Hand x to a rank that receives it; raises as `all_reduce`."""
        contiguous = x.contiguous()
        self._complete(f"send to rank {self._names[to]}", x, lambda group: group.send([contiguous], to, 0), peer=to)

    def receive(self, x: torch.Tensor, source: int) -> torch.Tensor:
        """Fill x, which must lie in one piece, from a rank that sends it; raises as `all_reduce`."""
        assert x.is_contiguous(), "what comes is written to x, which must lie in one piece"
        self._complete(
            f"receive from rank {self._names[source]}", x, lambda group: group.recv([x], source, 0), peer=source
        )
        return x

    def close(self) -> None:
        """Let go of the group. Idempotent."""
        self._group = None
        self._dead = self._dead or "it is closed"

    def _complete(self, what: str, x: torch.Tensor, start: Callable[[Group], Work], *, peer: int | None = None) -> None:
        """Start a call and see it through."""
        if self._dead is not None or self._group is None:
            raise TransportError(
                f"the transport of rank {self._names[self._rank]} cannot be used any more: {self._dead}"
            )
        try:
            work = start(self._group)
            if x.device.type == "cpu":
                work.wait(self._limit)
            else:
                # The host goes on: the stream waits, and a step that is recorded must not be waited for.
                work.wait()
        except RuntimeError as error:
            self._dead = f"{what} failed on {_among(self._rank, self._names)}: {error}"
            raise TransportError(self._dead, rank=peer) from error
