"""A runner without a model that notices every wrong block: its KV slots remember what they were computed from.

Each slot holds a digest of all tokens up to its position. Before computing a token the runner checks that the slots of
all earlier positions, read through the entry's block table, hold exactly the digests of the sequence's own past. So a
block shared, evicted or freed wrongly, or a token skipped, fails at the step where it first matters. The sampled token
is a function of the digest, hence of the whole past: `expected_output` computes it with no scheduler at all.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from qengine.request import Request, SamplingParams, TokenLogprobs
from qengine.scheduling.batch import Batch, BatchEntry, SampledToken, StepResult
from qengine.scheduling.block_pool import BlockPool

VOCAB = 50


def digest_of(parent: bytes, token_id: int) -> bytes:
    return hashlib.blake2b(parent + struct.pack("<q", token_id), digest_size=12).digest()


def next_token(digest: bytes, seed: int) -> int:
    return (digest[0] * 256 + digest[1] + seed) % VOCAB


def expected_output(request: Request, max_model_len: int) -> list[int]:
    """What a request must answer: greedy continuation of the digests until a stop token or a length limit."""
    digest = b""
    for token_id in request.prompt_token_ids:
        digest = digest_of(digest, token_id)
    output: list[int] = []
    stops = set(request.params.stop_token_ids or ())
    if not request.params.ignore_eos:
        stops |= request.eos_token_ids
    limit = min(request.max_tokens, max_model_len - request.num_prompt_tokens)
    while len(output) < limit:
        output.append(next_token(digest, request.seed))
        if output[-1] in stops and len(output) >= request.params.min_tokens:
            break
        digest = digest_of(digest, output[-1])
    return output


class FakeRunner:
    """Computes batches in a simulated KV cache and checks each against the past of its sequence."""

    def __init__(self, pool: BlockPool) -> None:
        self._size = pool.block_size
        self._slots: list[bytes | None] = [None] * (pool.num_blocks * pool.block_size)

    def step(self, batch: Batch, requests: dict[str, Request], failed: dict[str, str] | None = None) -> StepResult:
        """Run a batch; `requests` tells each sequence's tokens independently of what the entries claim."""
        written: set[int] = set()
        sampled, prompt_logprobs = {}, {}
        for entry in batch.entries:
            request = requests[entry.request_id]
            digest = self._run(entry, request, written)
            if entry.sample is not None:
                assert entry.context_len == request.num_tokens
                assert entry.sample.position == request.num_tokens
                sampled[entry.request_id] = SampledToken(next_token(digest, entry.sample.seed))
            if entry.prompt_targets:
                assert entry.num_prompt_logprobs == request.params.prompt_logprobs
                prompt_logprobs[entry.request_id] = [
                    TokenLogprobs(token_id, -1.0 * (entry.start + i), 1)
                    for i, token_id in enumerate(entry.prompt_targets)
                ]
        return StepResult(sampled, prompt_logprobs, failed or {})

    def _run(self, entry: BatchEntry, request: Request, written: set[int]) -> bytes:
        tokens = [*request.prompt_token_ids, *request.output_token_ids]
        assert entry.token_ids == tuple(tokens[entry.start : entry.context_len])
        assert entry.token_ids, "an entry computes nothing"
        assert len(entry.block_ids) * self._size >= entry.context_len, "the table does not cover the entry"
        digest = b""
        for position, token_id in enumerate(tokens[: entry.context_len]):
            digest = digest_of(digest, token_id)
            slot = entry.block_ids[position // self._size] * self._size + position % self._size
            if position < entry.start:
                assert self._slots[slot] == digest, f"{entry.request_id}: position {position} was never computed here"
                assert slot not in written, "a slot is read as past and written in one step"
            else:
                assert slot not in written, "two sequences write one slot"
                written.add(slot)
                self._slots[slot] = digest
        return digest


def make_request(
    request_id: str,
    prompt: Sequence[int],
    *,
    max_tokens: int = 4,
    seed: int = 0,
    eos: Sequence[int] = (),
    salt: str = "",
    follows: Request | None = None,
    **params: object,
) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        params=SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
        eos_token_ids=frozenset(eos),
        max_tokens=max_tokens,
        seed=seed,
        cache_salt=salt,
        follows=follows,
    )
