"""Track: what the scheduler remembers about one live request beside the request itself, and how a token ends it.

Invariant: `table` is `request.block_ids` as a tuple, and the first `num_registered` of those blocks are computed to the
last slot. A track takes no decisions about memory: it only answers questions about its own request.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qengine.request import FinishReason, Request
from qengine.scheduling.admission import GrowthForecast
from qengine.scheduling.batch import BatchEntry, PooledRows, SampleSpec

#: A request that was preempted this often is never chosen again.
MAX_PREEMPTIONS = 2


@dataclass(eq=False, slots=True)
class Track:
    """Scheduling state of one live request.

    Attributes:
        arrival: running number of `add`.
        worst_blocks: blocks it holds at most, when it ends by length.
        forecast: how long its answer may get.
        root: key its first block's hash hangs from; None when its blocks are not hashed.
        num_planned: leading tokens that are computed or that a step in flight computes.
        num_flights: steps in flight that compute tokens of it.
        num_turn: number of the last step that it was part of.
        num_registered: leading blocks offered to the prefix cache since the last admission.
        num_shared: leading blocks others may hold too, so that its end is not counted on to free them.
        high_water: most tokens it ever had computed; computing below it again is recomputing.
    """

    request: Request
    arrival: int
    worst_blocks: int
    forecast: GrowthForecast
    root: bytes | None = None
    table: tuple[int, ...] = ()
    running: bool = False
    num_planned: int = 0
    num_flights: int = 0
    num_turn: int = 0
    num_registered: int = 0
    num_shared: int = 0
    high_water: int = 0
    stop_token_ids: frozenset[int] = field(init=False)
    sample: SampleSpec = field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        self.stop_token_ids = frozenset(request.params.stop_token_ids or ())
        # One spec serves every step: its token lists are the request's own and grow with it.
        self.sample = SampleSpec(
            params=request.params,
            seed=request.seed,
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=request.output_token_ids,
            eos_token_ids=request.eos_token_ids,
        )

    @property
    def protected(self) -> bool:
        """Was preempted as often as allowed: runs only with its worst case reserved, and is never a victim."""
        return self.request.num_preemptions >= MAX_PREEMPTIONS

    @property
    def num_reserved(self) -> int:
        """Blocks promised to this running request and not taken yet."""
        return self.worst_blocks - len(self.table) if self.protected else 0

    @property
    def num_remaining(self) -> int:
        """Known tokens that no step has taken up; 1 for a request that decodes, 0 while its next token is awaited."""
        return self.request.num_tokens - self.num_planned

    @property
    def collects_prompt_logprobs(self) -> bool:
        """Whether prompt log-probabilities are still owed. The last prompt token predicts output, so it has none."""
        request = self.request
        wanted = request.params.prompt_logprobs is not None
        return wanted and len(request.prompt_logprobs) < request.num_prompt_tokens - 1

    @property
    def max_cached_tokens(self) -> int:
        """Leading tokens that may come from the prefix cache.

        Never all of them, as something must be computed to sample from; and where prompt log-probabilities are owed
        only positions whose own are in already. A mean needs the hidden states of all of them, and no block has those.
        """
        if self.request.pooling == "mean":
            return 0
        if self.collects_prompt_logprobs:
            return len(self.request.prompt_logprobs)
        return self.request.num_tokens - 1

    def extend_table(self, block_ids: list[int]) -> None:
        self.request.block_ids.extend(block_ids)
        self.table = tuple(self.request.block_ids)

    def clear_table(self) -> None:
        self.request.block_ids.clear()
        self.table = ()
        self.num_registered = 0
        self.num_shared = 0

    def entry(self, num_tokens: int) -> BatchEntry:
        """The next `num_tokens` tokens of the request as a batch entry; samples if the last known one is among them."""
        request = self.request
        start = self.num_planned
        end = start + num_tokens
        targets: tuple[int, ...] = ()
        if self.collects_prompt_logprobs and end > len(request.prompt_logprobs):
            targets = tuple(request.prompt_token_ids[start + 1 : end + 1])
        samples = end == request.num_tokens and request.pooling is None
        return BatchEntry(
            request_id=request.request_id,
            token_ids=request.tokens_between(start, end),
            start=start,
            block_ids=self.table,
            sample=self.sample if samples else None,
            num_prompt_logprobs=request.params.prompt_logprobs if targets else None,
            prompt_targets=targets,
            allowed=request.grammar.allowed if samples and request.grammar is not None else None,
            pool=self._pooled_rows(end),
        )

    def _pooled_rows(self, end: int) -> PooledRows | None:
        """What is wanted of a chunk that ends before `end`."""
        if self.request.pooling == "mean":
            return "sum"
        return "last" if self.request.pooling is not None and end == self.request.num_tokens else None


def end_after_token(track: Track, max_model_len: int) -> tuple[FinishReason, int | None] | None:
    """Why a request ends with its newest output token: (finish reason, stop reason), or None to go on.

    An end-of-sequence token has no stop reason, a stop token id is its own. Both count from `min_tokens` tokens on. A
    grammar that is complete ends the request whatever else is asked: nothing may follow.
    """
    request, params = track.request, track.request.params
    if request.grammar is not None and request.grammar.is_complete:
        return "stop", None
    token_id, num_output = request.output_token_ids[-1], len(request.output_token_ids)
    if num_output >= params.min_tokens:
        if token_id in request.eos_token_ids and not params.ignore_eos:
            return "stop", None
        if token_id in track.stop_token_ids:
            return "stop", token_id
    if num_output >= request.max_tokens or request.num_tokens >= max_model_len:
        return "length", None
    return None
