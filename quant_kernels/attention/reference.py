"""The specification of paged attention: one query at a time, in float32, straight from the definition.

Query token i of a sequence sits at position ``start + i`` and sees cached positions j with
``start + i - window < j <= start + i`` (no lower bound without a window). Query head h reads KV head
``h // (num_heads / num_kv_heads)``. A softcap c makes ``c * tanh(score / c)`` of a score; a sink is one more score of a
head's softmax, with no value. It is slow on purpose and only tests call it.
"""

from __future__ import annotations

import torch


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_ids: list[int],
    start: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one sequence.

    Args:
        query: [T, num_heads, head_dim], tokens at positions start .. start + T - 1.
        key_cache, value_cache: [num_blocks, block_size, num_kv_heads, head_dim].
        block_ids: the sequence's blocks in order.
        window: a token sees itself and window - 1 tokens before it; None for all.
        sinks: [num_heads].

    Returns:
        float32 [T, num_heads, head_dim].
    """
    num_tokens, num_heads, head_dim = query.shape
    keys = key_cache[block_ids].flatten(0, 1).float()
    values = value_cache[block_ids].flatten(0, 1).float()
    per_kv_head = num_heads // keys.shape[1]
    out = torch.empty(num_tokens, num_heads, head_dim)
    for i in range(num_tokens):
        last = start + i
        first = 0 if window is None else max(0, last - window + 1)
        for head in range(num_heads):
            k = keys[first : last + 1, head // per_kv_head]
            v = values[first : last + 1, head // per_kv_head]
            scores = k @ query[i, head].float() * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1].float()])
            out[i, head] = torch.softmax(scores, dim=0)[: len(v)] @ v
    return out
