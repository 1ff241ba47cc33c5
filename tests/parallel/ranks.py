"""A model on several ranks, as threads: tensor-parallel ranks in pipeline stages, each with its part and its cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from qengine.models.decoder import Decoder
from qengine.parallel.group import TPGroup
from qengine.parallel.split import TPSplit
from tests.models.in_memory import Sequences
from tests.parallel.threads import Baton, ThreadHub, ThreadTransport, on_ranks

#: A decoder for a place: the group of its ranks, and its stage's layers.
Build = Callable[[TPGroup, range], Decoder]
MakeSequences = Callable[[Decoder], Sequences]


class Ranks:
    """`num_ranks` x `len(stages)` threads that run one model; steps like `Sequences`."""

    def __init__(self, split: TPSplit, stages: Sequence[range], build: Build, make: MakeSequences = Sequences) -> None:
        self.num_ranks = len(split.ranks)
        self.stages = stages
        self._baton = Baton()
        groups = [ThreadHub(self.num_ranks, self._baton).transports() for _ in stages]
        pipes = [ThreadHub(len(stages), self._baton).transports() for _ in split.ranks]
        self._places = [(stage, rank) for stage in range(len(stages)) for rank in range(self.num_ranks)]

        def place(index: int) -> tuple[TPGroup, ThreadTransport, Sequences]:
            stage, rank = self._places[index]
            group = TPGroup(groups[stage][rank], split)
            return group, pipes[rank][stage], make(build(group, stages[stage]))

        self.parts = on_ranks(len(self._places), self._baton, place)

    @property
    def models(self) -> list[Decoder]:
        return [sequences.model for _, _, sequences in self.parts]

    def step(self, tokens: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
        """Logits, which every rank of the last stage must have the same bits of."""
        found = on_ranks(len(self._places), self._baton, lambda index: self._run(index, tokens))
        last = found[-self.num_ranks :]
        for other in last[1:]:
            for name, logits in last[0].items():
                assert torch.equal(logits, other[name]), "ranks disagree"
        return last[0]

    def _run(self, index: int, tokens: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
        group, pipe, sequences = self.parts[index]
        stage = pipe.rank
        try:
            step = sequences.prepare(tokens)
            x = step.token_ids
            if stage > 0:
                empty = torch.empty(len(x), sequences.model.config.hidden_size, dtype=sequences.model.dtype)
                x = pipe.receive(empty, stage - 1)
            hidden = sequences.forward(x, step)
            if stage < pipe.size - 1:
                pipe.send(hidden, stage + 1)
                return {}
            return sequences.logits(hidden, step)
        except BaseException:
            group.transport.close()
            raise
