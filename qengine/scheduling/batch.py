"""Batch: what one engine step runs, a frozen value handed from the scheduler to the runner.

There is no prefill and no decode here: an entry says which tokens of one sequence to compute next, and whether a new
token is to be sampled after them or their hidden states are pooled. Invariant: `token_ids[i]` sits at position
`start + i`, and `block_ids` covers every position up to and including the last. It does not own memory and holds no
tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from qengine.request import SamplingParams, TokenLogprobs

#: What an entry's hidden states are made into: the last one alone, or the sum of all of them.
PooledRows = Literal["last", "sum"]


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """How to sample the token after an entry's last one.

    The two token lists are the request's own, readable during the step and never changed by the runner.
    `seed` is already this choice's own (request seed + choice index). `eos_token_ids` are banned, like the stop token
    ids, until `min_tokens` tokens exist.
    """

    params: SamplingParams
    seed: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    eos_token_ids: frozenset[int]

    @property
    def position(self) -> int:
        """Index of the token to be sampled in the whole sequence (keys the random numbers)."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)


@dataclass(frozen=True, slots=True)
class BatchEntry:
    """One sequence's share of a step.

    `allowed` has a bit for each token that may be sampled (see `TokenGrammar`); None for all. It changes from step to
    step, while `sample` stays the same object as long as its sequence lives.
    """

    request_id: str
    token_ids: tuple[int, ...]
    start: int
    block_ids: tuple[int, ...]
    sample: SampleSpec | None
    # Prompt positions of this chunk whose next-token log-probabilities are wanted (prompt_logprobs).
    num_prompt_logprobs: int | None = None
    prompt_targets: tuple[int, ...] = ()
    allowed: bytes | None = None
    # What is wanted of the hidden states after the final norm, instead of a token.
    pool: PooledRows | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def context_len(self) -> int:
        """Tokens in the KV cache after this step."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """Entries of one step, in scheduling order."""

    entries: tuple[BatchEntry, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(entry.token_ids) for entry in self.entries)

    def __bool__(self) -> bool:
        return bool(self.entries)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What the runner answers for an entry with a `sample`: the token, and log-probabilities if asked for."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """Answers of one step by request id. A request in `failed` produced no token (NaN logits): the reason is given.

    `pooled` has float32 [hidden] in bytes for each entry that pools. `collective_seconds` has what the slowest rank
    spent in collectives, for each step of which all ranks have told by now: this one, or some before it, or none.
    """

    sampled: Mapping[str, SampledToken]
    prompt_logprobs: Mapping[str, Sequence[TokenLogprobs]] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    pooled: Mapping[str, bytes] = field(default_factory=dict)
    collective_seconds: Sequence[float] = ()
