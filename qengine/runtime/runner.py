"""ModelRunner: one engine step on one device, from a Batch to sampled tokens.

`begin` queues a step and `finish` waits for its tokens; on a GPU nothing in between waits for the device (but prompt
log-probabilities, where they are asked for), so the host is free while it works. Invariant: only rows that are sampled,
or a few at a time for prompt log-probabilities, get logits, so a step's memory does not grow with the vocabulary times
the chunk. A sequence whose logits are not finite fails alone: its bad blocks are zeroed and the others are unaffected.
It does not schedule and does not stop sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from qengine.models.decoder import Decoder
from qengine.request import TokenLogprobs
from qengine.runtime.inputs import PreparedStep, Steps
from qengine.runtime.kv_cache import KVCache
from qengine.runtime.sampler import PendingSamples, Sampler, token_logprobs
from qengine.scheduling.batch import Batch, BatchEntry, SampledToken, StepResult

#: Prompt positions whose logits are held at once.
_LOGPROB_ROWS = 32
NOT_FINITE = "the model produced logits that are not finite (NaN or infinity)"


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step that the device may still be working on."""

    entries: Sequence[BatchEntry]
    samples: PendingSamples | None
    prompt_logprobs: dict[str, Sequence[TokenLogprobs]]
    cache: KVCache

    @torch.inference_mode()
    def finish(self) -> StepResult:
        """Wait for the tokens."""
        tokens = [] if self.samples is None else self.samples.finish()
        sampled: dict[str, SampledToken] = {}
        failed: dict[str, str] = {}
        for entry, token in zip(self.entries, tokens, strict=True):
            if token is None:
                self.cache.clear_not_finite(entry.block_ids)
                failed[entry.request_id] = NOT_FINITE
            else:
                sampled[entry.request_id] = token
        return StepResult(sampled, self.prompt_logprobs, failed)


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
        self.steps = steps
        self._sampler = sampler
        self._graphs = graphs

    def step(self, batch: Batch) -> StepResult:
        """Compute the batch's tokens, and sample where asked."""
        return self.begin(batch).finish()

    @torch.inference_mode()
    def begin(self, batch: Batch) -> PendingStep:
        """Queue a step. The next one may be queued only after this one is finished."""
        hidden = None if self._graphs is None else self._graphs.try_run(batch.entries)
        if hidden is not None and self._graphs is not None:
            pending = PendingStep(batch.entries, self._sample(batch.entries, hidden), {}, self.cache)
            self._graphs.foresee(batch.entries)
            return pending
        step = self.steps.prepare(batch)
        hidden = self.model.forward(step.token_ids, self.cache.layers, step.inputs)
        entries = step.sample_entries
        samples = self._sample(entries, _rows(hidden, step.sample_rows)) if entries else None
        return PendingStep(entries, samples, self._prompt_logprobs(step, hidden), self.cache)

    def _sample(self, entries: Sequence[BatchEntry], hidden: torch.Tensor) -> PendingSamples:
        specs = [e.sample for e in entries if e.sample is not None]
        return self._sampler.begin(self.model.logits(hidden), specs)

    def _prompt_logprobs(self, step: PreparedStep, hidden: torch.Tensor) -> dict[str, Sequence[TokenLogprobs]]:
        """Log-probabilities of the prompt tokens that follow each computed position, for entries that ask."""
        records: dict[str, Sequence[TokenLogprobs]] = {}
        for entry, row in zip(step.entries, step.first_rows, strict=True):
            num_top = entry.num_prompt_logprobs
            if num_top is None or not entry.prompt_targets:
                continue
            found: list[TokenLogprobs] = []
            for first in range(0, len(entry.prompt_targets), _LOGPROB_ROWS):
                targets = entry.prompt_targets[first : first + _LOGPROB_ROWS]
                logits = self.model.logits(hidden[row + first : row + first + len(targets)])
                log_probs = torch.log_softmax(logits, dim=-1)
                found += [token_logprobs(log_probs[i], target, num_top) for i, target in enumerate(targets)]
            records[entry.request_id] = found
        return records


def _rows(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return hidden if len(rows) == len(hidden) else hidden.index_select(0, rows)
