"""The tokenizer that a GGUF file's metadata describes, ready to run.

Invariant: metadata that does not fit together is a LoadError, and so are tokens to be matched whole that take much
memory. What it describes is read by `converters.gguf_tokenizer`, which also writes it to folders; here it becomes a
Tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.errors import CheckpointError
from converters.gguf_tokenizer import TokenType, read_tokenizer
from qengine.errors import LoadError
from qengine.tokenizer.limits import require_small_additions
from qengine.tokenizer.loading import templates_from
from qengine.tokenizer.tokenizer import Tokenizer

#: Tokens of these types are matched whole; six more may be, by their ids.
_WHOLE = frozenset((TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED))


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file.

    Args:
        metadata: the file's key-value pairs as plain Python values, at least those beginning with "tokenizer.".

    Raises:
        LoadError: naming the key, what it holds and what was expected.
    """
    _require_few_whole(metadata)
    try:
        found = read_tokenizer(metadata)
    except CheckpointError as error:
        raise LoadError(str(error)) from error
    templates = templates_from(found.chat_template, "the GGUF metadata")
    return Tokenizer(
        found.backend,
        special_tokens=found.special_tokens,
        eos_token_ids=found.eos_token_ids,
        chat_templates={**templates, **found.named_chat_templates},
        other_tokens=found.other_tokens,
    )


def _require_few_whole(metadata: Mapping[str, Any]) -> None:
    """Lists of other kinds are for `read_tokenizer` to refuse."""
    tokens, types = (metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    if isinstance(tokens, list) and isinstance(types, list):
        pairs = zip(tokens, types, strict=False)
        whole = (text for text, kind in pairs if isinstance(text, str) and isinstance(kind, int) and kind in _WHOLE)
        require_small_additions(((text, False) for text in whole), (), (), "the GGUF file's token_type")
