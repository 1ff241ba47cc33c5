"""ModelRunner: one engine step on one device, from a Batch to sampled tokens.

Invariant: only rows that are sampled, or a few at a time for prompt log-probabilities, get logits, so a step's memory
does not grow with the vocabulary times the chunk. A sequence whose logits are not finite fails alone: its bad blocks
are zeroed and the others are unaffected. It does not schedule and does not stop sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qengine.models.decoder import Decoder
from qengine.request import TokenLogprobs
from qengine.runtime.inputs import PreparedStep, prepare_step
from qengine.runtime.kv_cache import KVCache
from qengine.runtime.sampler import sample, token_logprobs
from qengine.scheduling.batch import Batch, BatchEntry, SampledToken, StepResult

#: Prompt positions whose logits are held at once.
_LOGPROB_ROWS = 32
NOT_FINITE = "the model produced logits that are not finite (NaN or infinity)"


class ModelRunner:
    """Owns the model and the KV cache of one device."""

    def __init__(self, model: Decoder, cache: KVCache) -> None:
        self.model = model
        self.cache = cache

    @torch.inference_mode()
    def step(self, batch: Batch) -> StepResult:
        """Compute the batch's tokens, and sample where asked."""
        step = prepare_step(batch, self.model.rope, self.cache.block_size, self.model.dtype)
        hidden = self.model.forward(step.token_ids, self.cache.layers, step.inputs)
        sampled, failed = self._sample(step, hidden)
        return StepResult(sampled, self._prompt_logprobs(step, hidden), failed)

    def _sample(self, step: PreparedStep, hidden: torch.Tensor) -> tuple[dict[str, SampledToken], dict[str, str]]:
        entries = step.sample_entries
        if not entries:
            return {}, {}
        rows = step.sample_rows
        logits = self.model.logits(hidden if len(rows) == len(hidden) else hidden[rows])
        # One pass: NaN and infinity survive a sum, and finite logits cannot overflow one.
        finite: list[bool] = logits.sum(dim=-1).isfinite().tolist()
        failed = {e.request_id: NOT_FINITE for e, ok in zip(entries, finite, strict=True) if not ok}
        if failed:
            self._discard([e for e in entries if e.request_id in failed])
            logits = logits[torch.tensor(finite)]
            entries = [e for e in entries if e.request_id not in failed]
        specs = [e.sample for e in entries if e.sample is not None]
        tokens = sample(logits, specs)
        return {e.request_id: t for e, t in zip(entries, tokens, strict=True)}, failed

    def _discard(self, entries: Sequence[BatchEntry]) -> None:
        for entry in entries:
            self.cache.clear_not_finite(entry.block_ids)

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
