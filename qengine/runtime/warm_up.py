"""Steps that are run once before any request: the worst that the plan allows, and the smallest that is recorded.

The worst leaves torch's allocator on a GPU with as much memory as any later step needs, so that it grows no more, and a
plan that promised too much fails at the start instead of in the middle of an answer. Invariant: the cache is zero
afterwards, as it was. Results are thrown away.
"""

from __future__ import annotations

from dataclasses import replace

from qengine.request import SamplingParams
from qengine.runtime.model_bytes import LOGPROB_ROWS
from qengine.runtime.planner import MemoryPlan
from qengine.runtime.runner import ModelRunner
from qengine.scheduling.batch import Batch, BatchEntry, SampleSpec

_LOGPROBS = 20


def run_worst_step(runner: ModelRunner, plan: MemoryPlan) -> Batch:
    """Run it; returns what was run. Nobody may be using the cache yet."""
    batch = worst_batch(plan, _demanding(runner.model.config.vocab_size))
    runner.step(batch)
    runner.cache.clear({block_id for entry in batch.entries for block_id in entry.block_ids})
    return batch


def run_decode_step(runner: ModelRunner) -> None:
    """One sequence, one token: records the graph of such steps where there are graphs."""
    runner.step(Batch((_entry("0", 1, (0,), SamplingParams(temperature=0.0)),)))
    runner.cache.clear({0})


def _demanding(vocab_size: int) -> SamplingParams:
    """All that a step's logits are kept and copied for: edits, log-probabilities, and choosing by every rule."""
    return SamplingParams(
        temperature=1.0,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        logit_bias={0: 1.0},
        logprobs=min(_LOGPROBS, vocab_size),
    )


def worst_batch(plan: MemoryPlan, params: SamplingParams) -> Batch:
    """As many tokens as a step may have, and as many sequences that sample: one long chunk, the others one token each.

    Where sequences may not be so long, more of them have several tokens. The first asks for log-probabilities of its
    prompt, as many as two pieces: one is made while the one before it is still there.
    """
    num_seqs = min(plan.max_num_seqs, plan.max_num_batched_tokens)
    longest = min(plan.max_model_len, plan.num_blocks * plan.block_size)
    left, first_block, entries = plan.max_num_batched_tokens, 0, []
    for index in range(num_seqs):
        others = num_seqs - index - 1
        length = max(1, min(longest, left - others))
        blocks = -(-length // plan.block_size)
        # Where the pool is small, sequences lie on top of each other: what they compute does not matter.
        block_ids = tuple((first_block + i) % plan.num_blocks for i in range(blocks))
        entries.append(_entry(str(index), length, block_ids, params))
        left, first_block = left - length, first_block + blocks
    targets = entries[0].token_ids[: 2 * LOGPROB_ROWS]
    entries[0] = replace(entries[0], num_prompt_logprobs=params.logprobs or 0, prompt_targets=targets)
    return Batch(tuple(entries))


def _entry(name: str, length: int, block_ids: tuple[int, ...], params: SamplingParams) -> BatchEntry:
    token_ids = (0,) * length
    return BatchEntry(name, token_ids, 0, block_ids, SampleSpec(params, 0, token_ids, (), frozenset()))
