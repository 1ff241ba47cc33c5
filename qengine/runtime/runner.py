"""ModelRunner: one engine step on one device, from a Batch to sampled tokens.

`begin` queues a step and `finish` waits for its tokens; on a GPU nothing in between waits for the device, so the host
is free while it works. Invariant: only rows that are sampled, or a few at a time for prompt log-probabilities, get
logits, so a step's memory does not grow with the vocabulary times the chunk. A sequence whose logits are not finite
fails alone: its bad blocks are zeroed and the others are unaffected. It does not schedule and does not stop sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

from qengine.models.decoder import Decoder
from qengine.runtime.inputs import PreparedStep, Steps
from qengine.runtime.kv_cache import KVCache
from qengine.runtime.sampler import PendingSamples, Sampler
from qengine.runtime.sampling.logprobs import PendingPromptLogprobs
from qengine.runtime.sampling.transfer import Arrival
from qengine.scheduling.batch import Batch, BatchEntry, SampledToken, StepResult

#: Prompt positions whose logits are held at once.
_LOGPROB_ROWS = 32
NOT_FINITE = "the model produced logits that are not finite (NaN or infinity)"


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step that the device may still be working on."""

    entries: Sequence[BatchEntry]
    samples: PendingSamples | None
    prompt_logprobs: Mapping[str, PendingPromptLogprobs]
    cache: KVCache
    arrival: Arrival

    @torch.inference_mode()
    def finish(self) -> StepResult:
        """Wait for the tokens."""
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
        return StepResult(sampled, prompt_logprobs, failed)


class Graphs(Protocol):
    """Recorded steps; see `runtime.graphs`."""

    def try_run(self, entries: Sequence[BatchEntry]) -> torch.Tensor | None:
        """Hidden states [len(entries), hidden] of a decode step, or None where it must be launched."""
        ...

    def foresee(self, entries: Sequence[BatchEntry]) -> None:
        """Prepare the decode step that is likely to follow."""
        ...


class ModelRunner:
    """Owns the model and the KV cache of one device. `graphs` is None where steps are always launched one by one."""

    def __init__(
        self, model: Decoder, cache: KVCache, steps: Steps, sampler: Sampler, graphs: Graphs | None = None
    ) -> None:
        self.model = model
        self.cache = cache
        self._steps = steps
        self._sampler = sampler
        self._graphs = graphs

    def step(self, batch: Batch) -> StepResult:
        """Compute the batch's tokens, and sample where asked."""
        return self.begin(batch).finish()

    @torch.inference_mode()
    def begin(self, batch: Batch) -> PendingStep:
        """Queue a step. The next one may be queued only after this one is finished."""
        with _current(self.cache.device):
            return self._begin(batch)

    def _begin(self, batch: Batch) -> PendingStep:
        hidden = None if self._graphs is None else self._graphs.try_run(batch.entries)
        if hidden is not None and self._graphs is not None:
            pending = self._pending(batch.entries, self._sample(batch.entries, hidden), {})
            self._graphs.foresee(batch.entries)
            return pending
        step = self._steps.prepare(batch)
        hidden = self.model.forward(step.token_ids, self.cache.layers, step.inputs)
        entries = step.sample_entries
        samples = self._sample(entries, _rows(hidden, step.sample_rows)) if entries else None
        return self._pending(entries, samples, self._prompt_logprobs(step, hidden))

    def _pending(
        self,
        entries: Sequence[BatchEntry],
        samples: PendingSamples | None,
        prompt_logprobs: Mapping[str, PendingPromptLogprobs],
    ) -> PendingStep:
        return PendingStep(entries, samples, prompt_logprobs, self.cache, Arrival(self.cache.device))

    def _sample(self, entries: Sequence[BatchEntry], hidden: torch.Tensor) -> PendingSamples:
        specs = [e.sample for e in entries if e.sample is not None]
        allowed = [e.allowed for e in entries if e.sample is not None]
        return self._sampler.begin(self.model.logits(hidden), specs, allowed)

    def _prompt_logprobs(self, step: PreparedStep, hidden: torch.Tensor) -> dict[str, PendingPromptLogprobs]:
        """Log-probabilities of the prompt tokens that follow each computed position, for entries that ask."""
        pending: dict[str, PendingPromptLogprobs] = {}
        for entry, row in zip(step.entries, step.first_rows, strict=True):
            if entry.num_prompt_logprobs is None or not entry.prompt_targets:
                continue
            rows = hidden[row : row + len(entry.prompt_targets)]
            logits = (self.model.logits(piece) for piece in torch.split(rows, _LOGPROB_ROWS))
            pending[entry.request_id] = PendingPromptLogprobs.of(
                logits, entry.prompt_targets, entry.num_prompt_logprobs
            )
        return pending


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the thread's current one: Triton launches there, whatever its arguments' device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _rows(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return hidden if len(rows) == len(hidden) else hidden.index_select(0, rows)
