"""Which bytes a token stands for, and how the bytes of a sequence become text.

    byte-level BPE      token "Ġwörld" --map each character--> 20 77 c3 b6 ...     text = UTF-8 of all bytes
    SentencePiece       token "▁world" --replace "▁" by " "--> 20 77 ...           text = UTF-8 of all bytes,
                        token "<0xE4>" --byte fallback-------> e4                  less one space at the start

Invariant: a token's bytes depend on the token alone (and on being the first), so text can be made token by token and
decoding a sequence at once gives the same. The library's decoders agree on every sequence whose byte tokens are valid
UTF-8. Where they are not, the library replaces a whole run of byte tokens, complete characters included, which is
unknowable while streaming; here only the bytes outside complete characters become U+FFFD, one for each.
It does not know which tokens are special.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from tokenizers.decoders import Decoder

from qengine.errors import LoadError
from qengine.tokenizer.limits import MAX_DECODED_STRETCH, replaced_stretch
from qengine.tokenizer.rust_errors import library_errors

#: Characters to strip from the start of a text, which published tokenizers do to one. The tokens of a prompt are looked
#: at for as long as they are stripped.
_MAX_STRIPPED = 64
_FIRST_UNPRINTABLE = 256
_BYTE_TOKEN_LEN = len("<0x00>")
_HEX_DIGITS = frozenset("0123456789abcdefABCDEF")
#: Error handler of `bytes.decode`: one U+FFFD for each byte, where "replace" gives one for each broken character.
EACH_BYTE = "qengine.each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\N{REPLACEMENT CHARACTER}" * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _replace_each_byte)


def byte_alphabet() -> dict[str, int]:
    """The 256 characters in which byte-level BPE spells bytes, each with its byte.

    Printable Latin-1 bytes are themselves; the other 68 are U+0100 onward, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(_FIRST_UNPRINTABLE + rank): byte for rank, byte in enumerate(others)})
    return alphabet


_ALPHABET = byte_alphabet()


@dataclass(frozen=True)
class DecodingRule:
    """How one tokenizer's tokens become text.

    Attributes:
        byte_level: tokens are spelled in the byte alphabet.
        replacements: (old, new) pairs applied to each token's text, in order.
        byte_fallback: "<0xE4>" stands for the byte e4.
        dropped_in_first: character left out of the first token (a Metaspace decoder's "▁").
        strip: (character, count) removed from the start of the whole text, or ("", 0).
    """

    byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    dropped_in_first: str = ""
    strip: tuple[str, int] = ("", 0)

    @property
    def errors(self) -> str:
        """The error handler that makes text of bytes that are not UTF-8."""
        return "replace" if self.byte_level else EACH_BYTE

    def token_bytes(self, token: str, *, is_first: bool = False) -> bytes:
        """The bytes of the token spelled `token`."""
        if self.byte_level:
            try:
                return bytes([_ALPHABET[character] for character in token])
            except KeyError:
                return token.encode("utf-8")  # an added token, spelled as it is
        if is_first and self.dropped_in_first:
            token = token.replace(self.dropped_in_first, "")
        for old, new in self.replacements:
            token = token.replace(old, new)
        byte = _byte_of(token) if self.byte_fallback else None
        return token.encode("utf-8") if byte is None else bytes([byte])


def _byte_of(token: str) -> int | None:
    is_byte = len(token) == _BYTE_TOKEN_LEN and token.startswith("<0x") and token.endswith(">")
    return int(token[3:5], 16) if is_byte and {*token[3:5]} <= _HEX_DIGITS else None


class TextStream:
    """Makes text of bytes as they come: whole characters only, and what a rule strips from the start is stripped."""

    def __init__(self, rule: DecodingRule) -> None:
        self._rule = rule
        self._decoder = codecs.getincrementaldecoder("utf-8")(rule.errors)
        self._strip_char, self._num_to_strip = rule.strip

    def push(self, data: bytes) -> str:
        """The text that `data` completes; at most 3 bytes (a character's beginning) stay inside."""
        return self._stripped(self._decoder.decode(data))

    def finish(self) -> str:
        """The text of the bytes that stayed inside: no character, so U+FFFD."""
        return self._stripped(self._decoder.decode(b"", True))

    def drop_pending(self) -> None:
        """Forget the beginning of a character."""
        self._decoder.reset()

    def _stripped(self, text: str) -> str:
        if not text or not self._num_to_strip:
            return text
        head = text[: self._num_to_strip]
        num_stripped = len(head) - len(head.lstrip(self._strip_char))
        self._num_to_strip = self._num_to_strip - num_stripped if num_stripped == len(text) else 0
        return text[num_stripped:]


def decode_bytes(rule: DecodingRule, pieces: Iterable[bytes]) -> str:
    """The text of a whole sequence: what a TextStream gives for all its pieces."""
    stream = TextStream(rule)
    return stream.push(b"".join(pieces)) + stream.finish()


def decoding_rule(decoder: Decoder | None) -> DecodingRule:
    """The rule that a tokenizer's decoder follows.

    Raises:
        LoadError: if it cannot be followed token by token (none of the usual language models' decoders).
    """
    if decoder is None:
        raise _unsupported("no decoder")
    with library_errors(lambda reason: _unsupported(reason)):
        state = json.loads(decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    rule, last_stage = DecodingRule(), 0
    for step in steps:
        kind = step["type"]
        if kind not in _STEPS:
            raise _unsupported(kind)
        stage, apply = _STEPS[kind]
        if stage < last_stage:
            raise _unsupported(" then ".join(str(each["type"]) for each in steps))
        rule, last_stage = apply(rule, step), stage
    kinds = {step["type"] for step in steps}
    if "Strip" in kinds and "Fuse" not in kinds:
        raise _unsupported("Strip of every token")
    if {"ByteLevel", "ByteFallback"} <= kinds:
        raise _unsupported("ByteLevel with ByteFallback")
    _require_small_stretch(rule)
    return rule


def _require_small_stretch(rule: DecodingRule) -> None:
    stretch = 1.0
    for old, new in rule.replacements:
        stretch *= replaced_stretch(old, new)
        if stretch > MAX_DECODED_STRETCH:
            raise LoadError(
                f"the tokenizer's decoder makes a token more than {MAX_DECODED_STRETCH} times longer; a published "
                "tokenizer does nothing of the kind, so get the model from a source that you trust"
            )


def _unsupported(found: str) -> LoadError:
    return LoadError(
        f"the tokenizer's decoder is '{found}', expected ByteLevel, Metaspace, or a sequence of Replace, ByteFallback, "
        "Fuse and Strip in this order: this tokenizer cannot be decoded token by token"
    )


def _add_byte_level(rule: DecodingRule, step: dict[str, Any]) -> DecodingRule:
    if rule.replacements:
        raise _unsupported("Replace then ByteLevel")
    return replace(rule, byte_level=True)


def _add_replacement(rule: DecodingRule, step: dict[str, Any]) -> DecodingRule:
    pattern = step["pattern"].get("String")
    if not pattern:
        raise _unsupported("Replace of a regular expression")
    return replace(rule, replacements=(*rule.replacements, (pattern, step["content"])))


def _add_metaspace(rule: DecodingRule, step: dict[str, Any]) -> DecodingRule:
    mark = step["replacement"]
    dropped = mark if step.get("prepend_scheme", "always") != "never" else ""
    return replace(rule, replacements=(*rule.replacements, (mark, " ")), dropped_in_first=dropped)


def _add_byte_fallback(rule: DecodingRule, step: dict[str, Any]) -> DecodingRule:
    return replace(rule, byte_fallback=True)


def _add_strip(rule: DecodingRule, step: dict[str, Any]) -> DecodingRule:
    if step["stop"]:
        raise _unsupported("Strip at the end of the text")
    if step["start"] > _MAX_STRIPPED:
        raise _unsupported(f"Strip of {step['start']} characters")
    return replace(rule, strip=(step["content"], step["start"]))


def _add_nothing(rule: DecodingRule, step: dict[str, Any]) -> DecodingRule:
    return rule


#: Decoder step -> (stage, what it adds). A sequence is followed when its stages never go back.
_STEPS: dict[str, tuple[int, Callable[[DecodingRule, dict[str, Any]], DecodingRule]]] = {
    "ByteLevel": (1, _add_byte_level),
    "Replace": (1, _add_replacement),
    "Metaspace": (1, _add_metaspace),
    "ByteFallback": (2, _add_byte_fallback),
    "Fuse": (3, _add_nothing),
    "Strip": (4, _add_strip),
}
