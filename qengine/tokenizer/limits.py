"""Bounds on what a tokenizer is made of: how far its parts may stretch a text, and how many they are.

The `tokenizers` library bounds the backtracking of regular expressions itself (ten million steps of one match, then an
error); memory it does not bound, and running out of it would end the process. It normalizes added tokens while it reads
tokenizer.json, so that file is looked at before (`tokenizer_json`); whatever made a tokenizer, `check_backend` follows.
Invariant: what passes makes at most MAX_STRETCH bytes of one, in at most MAX_STEPS steps.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tokenizers

from qengine.errors import LoadError
from qengine.tokenizer.rust_errors import library_errors, shorten

#: How many times longer a text may become. Llama 2's normalizer has 12: a space becomes three bytes, and one is put in
#: front of each piece.
MAX_STRETCH = 64
#: Bytes of a normalized text; for each the library takes 17.
MAX_NORMALIZED_BYTES = 2**26
#: Normalizers, pre-tokenizers, post-processors and decoders of one kind. Published ones have up to 20.
MAX_STEPS = 128
#: Tokens put around a text.
MAX_TOKENS_AROUND = 128
#: Of one token; published ones have up to 1,024.
MAX_TOKEN_CHARS = 2**14
#: Of a decoder, which usually makes less of a token.
MAX_DECODED_STRETCH = 4
#: Of Unicode's compatibility forms: one character of three bytes becomes 33 bytes.
_UNICODE_STRETCH = 11.0
_STRETCHES = {
    **dict.fromkeys(("NFC", "NFD", "NFKC", "NFKD"), _UNICODE_STRETCH),
    # Takes accents apart, makes lower case, and puts spaces around Chinese characters.
    "BertNormalizer": 3 * 2.0 * 2,
    **dict.fromkeys(("ByteLevel", "Lowercase", "Nmt"), 2.0),
    **dict.fromkeys(("Strip", "StripAccents"), 1.0),
}
#: An expression that is one plain character, at least so many times.
_REPEATED_CHARACTER = re.compile(r"[^\\.^$*+?{}\[\]()|]\{(\d{1,4}),\}")
_TRIE_SIZE_BYTES = 4


def check_backend(backend: tokenizers.Tokenizer) -> float:
    """Refuse a tokenizer that makes much of little; return how many times longer a text may become.

    Raises:
        LoadError: with the part and its bound.
    """
    parts = {
        "normalizer": backend.normalizer,
        "pre-tokenizer": backend.pre_tokenizer,
        "post-processor": backend.post_processor,
        "decoder": backend.decoder,
    }
    for name, part in parts.items():
        require_few_steps(_state(part), f"the tokenizer's {name}")
    num_around = backend.num_special_tokens_to_add(False)
    if num_around > MAX_TOKENS_AROUND:
        raise LoadError(
            f"the tokenizer puts {num_around} tokens around a text, at most {MAX_TOKENS_AROUND} are allowed"
        )
    return require_small_stretch(_state(backend.normalizer), "the tokenizer")


def require_short_tokens(texts: Iterable[str]) -> None:
    """Refuse a vocabulary with a token that is none.

    Raises:
        LoadError: with its length.
    """
    longest = max(map(len, texts), default=0)
    if longest > MAX_TOKEN_CHARS:
        raise LoadError(f"the tokenizer has a token of {longest} characters, at most {MAX_TOKEN_CHARS} are allowed")


def require_few_steps(part: object, what: str) -> None:
    """Refuse a part of a tokenizer, as JSON, that is made of very many.

    Raises:
        LoadError: with their number.
    """
    num_steps = sum(1 for _ in _steps(part))
    if num_steps > MAX_STEPS:
        raise LoadError(f"{what} has {num_steps} steps, at most {MAX_STEPS} are allowed")


def require_small_stretch(normalizer: object, where: object) -> float:
    """Refuse a normalizer, as JSON, that makes much of little; return its stretch.

    Raises:
        LoadError: if a text could grow more than 64-fold, or it is of a kind that is not known.
    """
    if normalizer is None:
        return 1.0
    stretch = _stretch(normalizer, where)
    if stretch > MAX_STRETCH:
        raise LoadError(
            f"{where}: its normalizer grows a text up to {stretch:.0f} times, at most {MAX_STRETCH} is allowed; a "
            "published tokenizer does nothing of the kind, so get the model from a source that you trust"
        )
    return stretch


def replaced_stretch(old: str, new: str) -> float:
    """How many times longer a text may become where `old` is replaced by `new`."""
    return max(1.0, _num_bytes(new) / max(1, _num_bytes(old)))


def _state(part: Any) -> Any:
    if part is None:
        return None
    with library_errors(lambda reason: LoadError(f"the tokenizer has a part that cannot be written out: {reason}")):
        return json.loads(part.__getstate__())


def _steps(part: object) -> Iterator[Mapping[str, Any]]:
    """Every object in `part`: its steps, their patterns, and the pieces of a template."""
    found = [part]
    while found:
        value = found.pop()
        if isinstance(value, dict):
            yield value
            found.extend(value.values())
        elif isinstance(value, list):
            found.extend(value)


def _stretch(normalizer: object, where: object) -> float:
    """How many times longer a text becomes at most, in bytes; capped, so that a product stays a number."""
    fields = normalizer if isinstance(normalizer, dict) else {}
    kind = fields.get("type")
    if kind == "Sequence":
        product = 1.0
        for part in _list_of(fields.get("normalizers")):
            product = min(product * _stretch(part, where), 1e100)
        return product
    if kind == "Replace":
        return _stretch_of_replace(fields)
    if kind == "Prepend":
        # It is put in front of every piece of text between added tokens, and a piece may have one byte.
        return 1.0 + _num_bytes(fields.get("prepend"))
    if kind == "Precompiled":
        return _stretch_of_map(fields.get("precompiled_charsmap"), where)
    if not isinstance(kind, str) or kind not in _STRETCHES:
        raise LoadError(f"{where}: its normalizer is '{shorten(str(kind))}', which is not known")
    return _STRETCHES[kind]


def _stretch_of_replace(fields: Mapping[str, Any]) -> float:
    pattern, content = fields.get("pattern"), fields.get("content")
    pattern = pattern if isinstance(pattern, dict) else {}
    if "String" in pattern:
        return replaced_stretch(str(pattern["String"]), str(content))
    repeated = _REPEATED_CHARACTER.fullmatch(str(pattern.get("Regex")))
    if repeated is not None and int(repeated[1]) > 0:
        return max(1.0, _num_bytes(content) / int(repeated[1]))
    # Any other expression may match between any two characters.
    return 1.0 + _num_bytes(content)


def _stretch_of_map(charsmap: object, where: object) -> float:
    """A SentencePiece map: the size of a trie, the trie, and the texts that it points into, each ended by a zero."""
    try:
        data = base64.b64decode(str(charsmap or ""), validate=True)
    except (binascii.Error, ValueError) as error:
        raise LoadError(f"{where}: the map of its normalizer is not base64") from error
    texts = data[_TRIE_SIZE_BYTES + int.from_bytes(data[:_TRIE_SIZE_BYTES], "little") :]
    return float(max(1, *map(len, texts.split(b"\0"))))


def _list_of(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _num_bytes(text: object) -> int:
    return len(str(text or "").encode("utf-8", "surrogatepass"))
