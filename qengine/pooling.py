"""From what a request's steps pooled to its embedding.

Invariant: the arithmetic is float32 whatever the model computes in; a vector does not depend on how its prompt was cut.
"""

from __future__ import annotations

import numpy as np

from qengine.request import Request


def embedding_of(request: Request, *, normalize: bool) -> list[float] | None:
    """The vector [hidden] of a request that has ended well; None if it was none of pooling.

    Args:
        normalize: scale it to length 1. A vector of zeros stays as it is.
    """
    if request.pooling is None:
        return None
    parts = np.stack([np.frombuffer(part, dtype=np.float32) for part in request.pooled])
    vector = parts.sum(axis=0, dtype=np.float32)
    if request.pooling == "mean":
        vector /= np.float32(request.num_prompt_tokens)
    length = float(np.linalg.norm(vector)) if normalize else 0.0
    if length > 0.0:
        vector /= np.float32(length)
    values: list[float] = vector.tolist()
    return values
