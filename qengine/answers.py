"""Answers: what an engine keeps of a request beside its sequences, and the output that is made of both.

Invariant: an output says what is known so far, and may be made after every step. It neither runs requests nor ends
them; the engine does.
"""

from __future__ import annotations

from dataclasses import dataclass

from qengine.pooling import embedding_of
from qengine.request import (
    CompletionOutput,
    Logprob,
    PositionLogprobs,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from qengine.step_stats import times_of
from qengine.tokenizer import IncrementalDetokenizer, Tokenizer


@dataclass(slots=True)
class Choice:
    """One of a request's n answers: its sequence, its text so far, its public log-probabilities."""

    request: Request
    detokenizer: IncrementalDetokenizer | None
    num_fed: int = 0
    logprobs: list[PositionLogprobs] | None = None
    cumulative_logprob: float | None = None


@dataclass(slots=True)
class PendingRequest:
    """A request that is tokenized and checked but not yet in the engine. `normalizes` is of an embedding."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    choices: list[Choice]
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    normalizes: bool = False


def public_logprobs(record: TokenLogprobs, tokenizer: Tokenizer) -> PositionLogprobs:
    """Log-probabilities by token id, with each token's text and rank."""
    public = {
        token_id: Logprob(logprob, rank, tokenizer.token_text(token_id))
        for rank, (token_id, logprob) in enumerate(record.top, start=1)
    }
    if record.token_id not in public:
        text = tokenizer.token_text(record.token_id)
        public[record.token_id] = Logprob(record.logprob, record.rank, text)
    return public


def output_of(group: PendingRequest, tokenizer: Tokenizer, *, finished: bool) -> RequestOutput:
    """The output of a request so far.

    Args:
        finished: every choice has ended.
    """
    first = group.choices[0].request
    if group.prompt_logprobs is not None:
        # Grows while the prompt is computed, and is then the same in every step.
        known = len(group.prompt_logprobs) - 1
        group.prompt_logprobs.extend(public_logprobs(r, tokenizer) for r in first.prompt_logprobs[known:])
    failed = next((c.request for c in group.choices if c.request.error is not None), None)
    return RequestOutput(
        request_id=group.request_id,
        prompt=group.prompt,
        prompt_token_ids=group.prompt_token_ids,
        outputs=[] if first.pooling else [_completion(i, c) for i, c in enumerate(group.choices)],
        prompt_logprobs=group.prompt_logprobs,
        num_cached_tokens=first.num_cached_tokens,
        finished=finished,
        error=failed.error if failed is not None else None,
        error_code=failed.error_code if failed is not None else None,
        times=times_of([c.request for c in group.choices]) if finished else None,
        embedding=embedding_of(first, normalize=group.normalizes) if first.finish_reason == "stop" else None,
    )


def _completion(index: int, choice: Choice) -> CompletionOutput:
    request = choice.request
    return CompletionOutput(
        index=index,
        text=choice.detokenizer.text if choice.detokenizer is not None else "",
        token_ids=list(request.output_token_ids),
        cumulative_logprob=choice.cumulative_logprob,
        logprobs=None if choice.logprobs is None else list(choice.logprobs),
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
    )
