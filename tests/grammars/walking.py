"""Following a grammar without a model."""

from __future__ import annotations

import random

import numpy as np

from qengine.grammars.state import GrammarState
from qengine.tokenizer import Tokenizer


def allowed_ids(state: GrammarState) -> list[int]:
    """The tokens that may be next."""
    bits = np.unpackbits(np.frombuffer(state.allowed, np.uint8), bitorder="little")
    return [int(token_id) for token_id in np.flatnonzero(bits)]


def walk(state: GrammarState, tokenizer: Tokenizer, seed: int, max_tokens: int = 400) -> str:
    """The text of random allowed tokens, ended as soon as it may be: like a model without sense."""
    choose, ids = random.Random(seed), []
    while not state.is_complete:
        assert len(ids) < max_tokens, tokenizer.decode(ids)
        found = allowed_ids(state)
        ends = [token_id for token_id in found if token_id in tokenizer.eos_token_ids]
        token_id = ends[0] if ends else choose.choice(found)
        state.accept(token_id)
        ids.append(token_id)
    return tokenizer.decode(ids[:-1], skip_special_tokens=False)
