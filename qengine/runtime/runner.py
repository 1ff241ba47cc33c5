"""ModelRunner: one engine step on one device, from a Batch to sampled tokens.

`begin` queues a step and `finish` waits for its tokens; on a GPU nothing in between waits for the device, so the host
is free while it works. Invariant: only rows that are sampled, or a few at a time for prompt log-probabilities, get
logits, and of rows that are pooled only the vectors remain, so a step's memory does not grow with the vocabulary times
the chunk. A sequence whose logits or vector are not finite fails alone: its bad blocks are zeroed and the others are
unaffected. A step that runs out of memory leaves nothing behind that the next one would notice. Where ranks share the
model, all of them run each step, and one draws the tokens. It does not schedule and does not stop sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

from qengine.models.decoder import Decoder
from qengine.runtime.inputs import PreparedStep, Steps
from qengine.runtime.kv_cache import KVCache
from qengine.runtime.links import Links
from qengine.runtime.model_bytes import LOGPROB_ROWS
from qengine.runtime.out_of_memory import memory_guard
from qengine.runtime.sampler import PendingSamples, Sampler
from qengine.runtime.sampling.logprobs import PendingPromptLogprobs
from qengine.runtime.sampling.transfer import Arrival, to_host
from qengine.scheduling.batch import Batch, BatchEntry, PooledRows, SampledToken, StepResult

NOT_FINITE = "the model produced logits that are not finite (NaN or infinity)"
NOT_FINITE_STATES = "the model produced hidden states that are not finite (NaN or infinity)"


@dataclass(frozen=True, slots=True)
class PendingPooled:
    """Pooled hidden states on their way to the host: float32 [entries, hidden]."""

    entries: Sequence[BatchEntry]
    vectors: torch.Tensor


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step that the device may still be working on."""

    entries: Sequence[BatchEntry]
    samples: PendingSamples | None
    prompt_logprobs: Mapping[str, PendingPromptLogprobs]
    pooled: PendingPooled | None
    cache: KVCache
    arrival: Arrival

    @torch.inference_mode()
    def finish(self) -> StepResult:
        """Wait for the tokens.

        Raises:
            StepMemoryError: as `ModelRunner.begin`.
        """
        with memory_guard(self.cache.device):
            return self._finish()

    def _finish(self) -> StepResult:
        self.arrival.wait()
        prompt_logprobs = {name: pending.records() for name, pending in self.prompt_logprobs.items()}
        tokens = [] if self.samples is None else self.samples.finish()
        sampled: dict[str, SampledToken] = {}
        failed: dict[str, str] = {}
        for entry, token in zip(self.entries, tokens, strict=True):
            if token is None:
                self.cache.clear_not_finite(entry.block_ids)
                failed[entry.request_id] = NOT_FINITE
            else:
                sampled[entry.request_id] = token
        pooled = {} if self.pooled is None else self._take_pooled(self.pooled, failed)
        return StepResult(sampled, prompt_logprobs, failed, pooled)

    def _take_pooled(self, pending: PendingPooled, failed: dict[str, str]) -> dict[str, bytes]:
        """The vectors; those that are not finite are noted in `failed`."""
        found: dict[str, bytes] = {}
        for entry, vector in zip(pending.entries, pending.vectors, strict=True):
            if bool(torch.isfinite(vector).all()):
                found[entry.request_id] = vector.numpy().tobytes()
            else:
                self.cache.clear_not_finite(entry.block_ids)
                failed[entry.request_id] = NOT_FINITE_STATES
        return found


class Graphs(Protocol):
    """Recorded steps; see `runtime.graphs`."""

    def try_run(self, entries: Sequence[BatchEntry]) -> torch.Tensor | None:
        """Hidden states [len(entries), hidden] of a decode step, or None where it must be launched."""
        ...

    def foresee(self, entries: Sequence[BatchEntry]) -> None:
        """Prepare the decode step that is likely to follow."""
        ...


class ModelRunner:
    """Owns the model and the KV cache of one device.

    Args:
        model: the whole of it, or this rank's part.
        graphs: None where steps are always launched one by one; for a single stage.
        links: to the other ranks; None if there are none.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        steps: Steps,
        sampler: Sampler,
        graphs: Graphs | None = None,
        *,
        links: Links | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.steps = steps
        self._sampler = sampler
        self._graphs = graphs
        self.links = links or Links()

    def step(self, batch: Batch) -> StepResult:
        """Compute the batch's tokens, and sample where asked."""
        return self.begin(batch).finish()

    @torch.inference_mode()
    def begin(self, batch: Batch) -> PendingStep:
        """Queue a step. The next one may be queued only after this one is finished.

        Raises:
            StepMemoryError: there is no memory for it. It may be begun again, whole or in parts: what it has stored
                is stored again, the same. Ranks that share it stand at different places then, and cannot go on.
        """
        with memory_guard(self.cache.device), _current(self.cache.device):
            return self._begin(batch)

    def _begin(self, batch: Batch) -> PendingStep:
        hidden = None if self._graphs is None else self._graphs.try_run(batch.entries)
        if hidden is not None and self._graphs is not None:
            pending = self._pending(batch.entries, self._sample(batch.entries, hidden), {}, None)
            self._graphs.foresee(batch.entries)
            return pending
        step = self.steps.prepare(batch)
        hidden = self.model.forward(self.stage_input(step), self.cache.layers, step.inputs)
        if not self.links.is_last:
            self.hand_on(hidden)
            return self._pending((), None, {}, None)
        entries = step.sample_entries
        samples = self._sample(entries, _rows(hidden, step.sample_rows)) if entries else None
        prompt_logprobs, pooled = self._prompt_logprobs(step, hidden), self._pooled(step, hidden)
        return self._pending(entries if samples else (), samples, prompt_logprobs, pooled)

    def stage_input(self, step: PreparedStep) -> torch.Tensor:
        """Token ids for the first stage, what the stage before computed for the others."""
        if self.links.is_first:
            return step.token_ids
        rows, hidden_size = len(step.token_ids), self.model.config.hidden_size
        hidden = torch.empty(rows, hidden_size, dtype=self.model.dtype, device=self.cache.device)
        return self.links.pipe.receive(hidden, self.links.pipe.rank - 1)

    def hand_on(self, hidden: torch.Tensor) -> None:
        """Give the stage after this one what it starts from."""
        self.links.pipe.send(hidden, self.links.pipe.rank + 1)

    def _pending(
        self,
        entries: Sequence[BatchEntry],
        samples: PendingSamples | None,
        prompt_logprobs: Mapping[str, PendingPromptLogprobs],
        pooled: PendingPooled | None,
    ) -> PendingStep:
        return PendingStep(entries, samples, prompt_logprobs, pooled, self.cache, Arrival(self.cache.device))

    def _sample(self, entries: Sequence[BatchEntry], hidden: torch.Tensor) -> PendingSamples | None:
        """Draw a token for every row; None on ranks that only have their part of the logits to give."""
        logits = self.model.logits(hidden)
        if not self.links.samples:
            return None
        specs = [e.sample for e in entries if e.sample is not None]
        allowed = [e.allowed for e in entries if e.sample is not None]
        return self._sampler.begin(logits, specs, allowed)

    def _prompt_logprobs(self, step: PreparedStep, hidden: torch.Tensor) -> dict[str, PendingPromptLogprobs]:
        """Log-probabilities of the prompt tokens that follow each computed position, for entries that ask."""
        pending: dict[str, PendingPromptLogprobs] = {}
        for entry, row in zip(step.entries, step.first_rows, strict=True):
            if entry.num_prompt_logprobs is None or not entry.prompt_targets:
                continue
            rows = hidden[row : row + len(entry.prompt_targets)]
            logits = (self.model.logits(piece) for piece in torch.split(rows, LOGPROB_ROWS))
            if not self.links.samples:
                _exhaust(logits)
                continue
            pending[entry.request_id] = PendingPromptLogprobs.of(
                logits, entry.prompt_targets, entry.num_prompt_logprobs
            )
        return pending

    def _pooled(self, step: PreparedStep, hidden: torch.Tensor) -> PendingPooled | None:
        """What entries want of their hidden states; None if none does, or another rank answers."""
        rows = [(entry, row) for entry, row in zip(step.entries, step.first_rows, strict=True) if entry.pool]
        if not rows or not self.links.samples:
            return None
        vectors = [_pool(hidden[row : row + entry.num_tokens], entry.pool) for entry, row in rows]
        return PendingPooled([entry for entry, _ in rows], to_host(torch.stack(vectors)))


def _pool(hidden: torch.Tensor, pool: PooledRows | None) -> torch.Tensor:
    """[rows, hidden] in the model's dtype to float32 [hidden]."""
    return hidden.float().sum(0) if pool == "sum" else hidden[-1].float()


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the thread's current one: Triton launches there, whatever its arguments' device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _exhaust(logits: Iterator[torch.Tensor]) -> None:
    """Take part in computing logits that another rank looks at."""
    for _ in logits:
        pass


def _rows(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return hidden if len(rows) == len(hidden) else hidden.index_select(0, rows)
