"""Bounds on a tokenizer's files, which come from strangers: their sizes, and how far a normalizer may stretch a text.

Backtracking of regular expressions has a bound in the `tokenizers` library itself (ten million steps of one match, then
an error); memory has none there, and running out of it would end the process.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from qengine.errors import LoadError

#: The largest published tokenizer.json has 33 MB.
MAX_TOKENIZER_BYTES = 2**27
#: tokenizer_config.json and its kind: with all added tokens some have 1 MB.
MAX_CONFIG_BYTES = 2**24
#: The longest published chat template has some 20,000 characters.
MAX_TEMPLATE_BYTES = 2**20
#: How many times longer a text may become. Llama 2 has 3: a space becomes three bytes.
MAX_STRETCH = 64
#: Of Unicode's compatibility forms: one character of three bytes becomes 33 bytes.
_UNICODE_STRETCH = 11
_UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled")


def require_size(path: Path, max_bytes: int) -> None:
    """Refuse a file that is larger than files of its kind are.

    Raises:
        LoadError: with both sizes.
    """
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}") from error
    if num_bytes > max_bytes:
        raise LoadError(f"{path} has {num_bytes} bytes, at most {max_bytes} are expected; download the file again")


def check_normalizer(backend: tokenizers.Tokenizer, where: object) -> None:
    """Refuse a normalizer that makes much of little.

    Raises:
        LoadError: if a text could grow more than 64-fold.
    """
    if backend.normalizer is None:
        return
    stretch = _stretch(json.loads(backend.normalizer.__getstate__()))
    if stretch > MAX_STRETCH:
        raise LoadError(
            f"{where}: its normalizer grows a text up to {stretch:.0f} times, at most {MAX_STRETCH} is allowed; a "
            "published tokenizer does nothing of the kind, so get the model from a source that you trust"
        )


def _stretch(normalizer: dict[str, Any]) -> float:
    """How many times longer a text becomes at most, in bytes; capped, so that a product stays a number."""
    kind = normalizer.get("type")
    if kind == "Sequence":
        product = 1.0
        for part in normalizer.get("normalizers", ()):
            product = min(product * _stretch(part), 1e100)
        return product
    if kind == "Replace":
        pattern, content = normalizer.get("pattern", {}), len(str(normalizer.get("content", "")).encode())
        # An expression may match between any two characters.
        return max(1.0, content / max(1, len(pattern["String"].encode()))) if "String" in pattern else 1.0 + content
    if kind == "Prepend":
        return 1.0 + len(str(normalizer.get("prepend", "")).encode()) / 64
    return float(_UNICODE_STRETCH) if kind in _UNICODE_FORMS else 2.0 if kind == "ByteLevel" else 1.0
