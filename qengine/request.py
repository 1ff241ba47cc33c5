"""What a request is: the sampling parameters it came with, its state on the way, and the output it becomes.

`SamplingParams` and the outputs are frozen values; `Request` is mutable and owned by the scheduler alone.
Invariant: `num_computed_tokens` <= `num_tokens`, and a request is finished exactly when `finish_reason` is set.
Nothing here knows about tensors, text decoding or HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from qengine.errors import RequestError

FinishReason = Literal["stop", "length", "abort", "error"]
#: How one vector is made of a text's hidden states: that of the last token, or the mean over all of them.
Pooling = Literal["last", "mean"]

#: `error_code` of a request for which there was no memory, and of one whose grammar could not be followed to its end.
OUT_OF_MEMORY = "out_of_memory"
GRAMMAR_FAILED = "grammar_failed"

#: Below this temperature sampling is greedy (the argmax), as in vLLM.
GREEDY_TEMPERATURE = 1e-5
MAX_SEED = 2**63
#: Beyond these a float32 logit could overflow; no useful setting comes near.
MAX_TEMPERATURE = 1000.0
REPETITION_PENALTIES = (0.01, 100.0)


def _refuse(param: str, found: object, expected: str) -> RequestError:
    shown = repr(found)
    return RequestError(
        f"{param} is {shown if len(shown) <= 80 else shown[:77] + '...'}, expected {expected}", param=param
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # A whole number that no float holds.
        return False


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """What an answer must look like: exactly one of the fields. Names and meanings are vLLM's.

    Attributes:
        json: a JSON schema, as an object or as text.
        json_object: True for any JSON object.
        regex: a regular expression that the whole answer matches, in the syntax of Rust's regex crate.
        choice: the answer is one of these strings.
        grammar: a context-free grammar, in Lark's syntax or llama.cpp's GBNF.

    Raises:
        RequestError: not exactly one field is given.
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = {"json": self.json, "regex": self.regex, "choice": self.choice, "grammar": self.grammar}
        names = [name for name, value in given.items() if value is not None]
        names += ["json_object"] if self.json_object else []
        if len(names) != 1:
            raise RequestError(
                f"structured_outputs gives {', '.join(names) or 'nothing'}, expected exactly one of json, json_object, "
                "regex, choice and grammar",
                param="structured_outputs",
            )


class TokenGrammar(Protocol):
    """Which tokens may come next in one sequence. Whoever owns the sequence tells it every token.

    Attributes:
        allowed: a bit per token of the vocabulary: bit i of the little-endian uint32 word w is token 32 * w + i.
        is_complete: the token that ends the sequence was accepted.
    """

    @property
    def allowed(self) -> bytes: ...

    @property
    def is_complete(self) -> bool: ...

    def accept(self, token_id: int) -> None:
        """Move on by one token.

        Raises:
            GrammarError: the token is not allowed, or what comes next is too costly to find out.
        """
        ...


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. Names, meanings and defaults are vLLM's.

    Attributes:
        n: number of choices; choice i uses seed + i.
        temperature: 0 (below 1e-5) is greedy; at most 1000.
        top_p: keep the smallest set of tokens whose probability reaches top_p, in (0, 1].
        top_k: keep the k most likely tokens; 0, -1 or more than the vocabulary is off.
        min_p: keep tokens at least min_p times as likely as the likeliest, in [0, 1].
        presence_penalty, frequency_penalty: -2 to 2, over the output.
        repetition_penalty: 0.01 to 100, 1 is off, over prompt and output.
        seed: makes this request reproducible whatever else is in the batch.
        max_tokens: tokens to generate at most; None for as many as the context holds.
        min_tokens: end-of-sequence and stop tokens are banned until this many tokens exist.
        stop: a string or strings that end the text (not included unless include_stop_str_in_output).
        stop_token_ids: token ids that end the sequence.
        ignore_eos: do not stop at the model's end-of-sequence tokens.
        logprobs: return this many likeliest tokens' log-probabilities for each token, and the chosen one's.
        prompt_logprobs: the same for the prompt's tokens (skips the prefix cache).
        logit_bias: token id -> value in [-100, 100] added to its logit.
        allowed_token_ids: only these may be sampled.
        structured_outputs: a form that the answer is made to have; it may still be cut by max_tokens.
        skip_special_tokens: leave special tokens out of the text.
        detokenize: make text at all.

    Raises:
        RequestError: naming the field, what it was and what was expected.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self._as_tuple("stop")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", self._as_tuple("stop_token_ids"))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", self._as_tuple("allowed_token_ids"))
        if self.logit_bias is not None and not isinstance(self.logit_bias, Mapping):
            raise _refuse("logit_bias", self.logit_bias, "a mapping of token ids to numbers")
        self._check_counts()
        self._check_ranges()
        self._check_tokens()

    def _as_tuple(self, name: str) -> tuple[Any, ...]:
        value = getattr(self, name)
        if value is not None and (isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable)):
            raise _refuse(name, value, "a list")
        return tuple(value or ())

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple of strings."""
        return tuple(self.stop or ())

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    def _check_counts(self) -> None:
        bounds: dict[str, tuple[int, int | None, bool]] = {
            "n": (1, None, False),
            "max_tokens": (1, None, True),
            "min_tokens": (0, None, False),
            "logprobs": (0, None, True),
            "prompt_logprobs": (0, None, True),
            "top_k": (-1, None, False),
            "seed": (0, MAX_SEED - 1, True),
        }
        for name, (low, high, optional) in bounds.items():
            value = getattr(self, name)
            if value is None and optional:
                continue
            if not _is_int(value) or value < low or (high is not None and value > high):
                upper = f" and at most {high}" if high is not None else ""
                raise _refuse(name, value, f"an integer of at least {low}{upper}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _refuse("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")

    def _check_ranges(self) -> None:
        ranges = {
            "temperature": (0.0, MAX_TEMPERATURE),
            "min_p": (0.0, 1.0),
            "presence_penalty": (-2.0, 2.0),
            "frequency_penalty": (-2.0, 2.0),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not _is_number(value) or not low <= value <= high:
                raise _refuse(name, value, f"a finite number from {low:g} to {high:g}")
        low_penalty, high_penalty = REPETITION_PENALTIES
        if not _is_number(self.top_p) or not 0.0 < self.top_p <= 1.0:
            raise _refuse("top_p", self.top_p, "a finite number above 0 and at most 1")
        if not _is_number(self.repetition_penalty) or not low_penalty <= self.repetition_penalty <= high_penalty:
            raise _refuse(
                "repetition_penalty", self.repetition_penalty, f"a number from {low_penalty} to {high_penalty}"
            )

    def _check_tokens(self) -> None:
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise _refuse("stop", text, "non-empty strings")
        for name in ("stop_token_ids", "allowed_token_ids"):
            for token_id in getattr(self, name) or ():
                if not _is_int(token_id) or token_id < 0:
                    raise _refuse(name, token_id, "token ids of at least 0")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise _refuse("allowed_token_ids", self.allowed_token_ids, "at least one token id")
        for key, value in (self.logit_bias or {}).items():
            if not _is_int(key) or key < 0 or not _is_number(value) or not -100 <= value <= 100:
                raise _refuse("logit_bias", {key: value}, "token ids with values from -100 to 100")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Raw log-probabilities at one position (log_softmax of the model's own logits, before any processing).

    `rank` is 1 for the likeliest token. `top` lists (token id, log-probability), likeliest first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Logprob:
    """One entry of the public log-probability dictionaries."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]


@dataclass(slots=True)
class Request:
    """One sequence being answered. The scheduler owns and changes it; others only read.

    `cache_salt` goes into the first block's hash: requests with different salts never share blocks.
    `follows` is a sibling (another choice of the same prompt) whose prompt blocks this request waits to share.
    `grammar` says which tokens may come next; it is this request's own and outlives preemption.
    With `pooling` it is no sequence to continue: its prompt is computed, `pooled` gathers what its steps give (float32
    [hidden] in bytes: one vector, or for the mean the sum over each chunk), and it ends without a token.
    Times are seconds of `time.monotonic`, 0 until it happens; the engine sets them. `scheduled_time` is the last time
    that it was given blocks before its first token.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    max_tokens: int = 16
    seed: int = 0
    cache_salt: str = ""
    follows: Request | None = None
    arrival_time: float = 0.0
    queued_time: float = 0.0
    scheduled_time: float = 0.0
    first_token_time: float = 0.0
    last_token_time: float = 0.0
    grammar: TokenGrammar | None = None
    pooling: Pooling | None = None

    output_token_ids: list[int] = field(default_factory=list)
    output_logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    pooled: list[bytes] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    error_code: str | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def max_total_tokens(self) -> int:
        """Tokens of prompt and output when it ends by length."""
        return len(self.prompt_token_ids) + self.max_tokens

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def tokens_between(self, start: int, end: int) -> tuple[int, ...]:
        """Token ids at positions start..end-1 of prompt and output."""
        prompt_len = len(self.prompt_token_ids)
        if end <= prompt_len:
            return tuple(self.prompt_token_ids[start:end])
        if start >= prompt_len:
            return tuple(self.output_token_ids[start - prompt_len : end - prompt_len])
        return (*self.prompt_token_ids[start:], *self.output_token_ids[: end - prompt_len])


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One choice of an answer, as far as it is known."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """When it happened to a request, in seconds of `time.monotonic`: of several choices the first to come or to begin,
    and the last to end. 0 where it never did."""

    arrival: float
    queued: float
    scheduled: float
    first_token: float
    last_token: float


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """An answer, whole or so far. `error` is set when the request failed inside the engine, `times` at its end.

    `embedding` is what a request with pooling ends in; it has no `outputs`.
    `error_code` says of some errors what they are: `OUT_OF_MEMORY` or `GRAMMAR_FAILED`.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    num_cached_tokens: int = 0
    finished: bool = False
    error: str | None = None
    error_code: str | None = None
    times: RequestTimes | None = None
    embedding: list[float] | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """The vector of a text: float [hidden], of length 1 if it was normalized."""

    embedding: list[float]


@dataclass(frozen=True, slots=True)
class EmbeddingRequestOutput:
    """What `LLM.embed` gives for one prompt. Names are vLLM's."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    finished: bool = True


@dataclass(frozen=True, slots=True)
class RequestProgress:
    """How far a request is that has no token yet.

    Attributes:
        queue_position: its place among the requests that wait, from 1; None once it is being computed.
        num_computed_tokens: tokens of its prompt that are computed, or were found in the prefix cache.
    """

    request_id: str
    queue_position: int | None
    num_prompt_tokens: int
    num_computed_tokens: int
