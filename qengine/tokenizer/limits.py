"""Bounds on what a tokenizer is made of: how far its parts may stretch a text, and how many they are.

The `tokenizers` library bounds the backtracking of regular expressions itself (ten million steps of one match, then an
error); memory it does not bound, and running out of it would end the process. It normalizes added tokens while it reads
tokenizer.json, so that file is looked at before (`tokenizer_json`); whatever made a tokenizer, `check_backend` follows.
Invariant: what passes makes at most MAX_STRETCH bytes of one, in at most MAX_STEPS steps, and the ids of a text are
bounded by what `Growth` says. No expression has a number of ways to match that is exponential in the text; a power of
the text's length is not excluded, so a text may still take long.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import tokenizers

from qengine.errors import LoadError
from qengine.tokenizer.rust_errors import library_errors, shorten

#: How many times longer a text may become. Llama 2's normalizer has 12: a space becomes three bytes, and one is put in
#: front of each piece.
MAX_STRETCH = 64
#: Bytes of a normalized text, for each of which the library takes 34 bytes, and 62 while they are counted.
MAX_NORMALIZED_BYTES = 2**24
#: Of a text, for each of which the library takes 160 bytes, and 330 where each is a piece of its own.
MAX_IDS = 2**23
#: Of all added tokens, as the library looks for them: it takes 80 for each while it prepares the search, and 35 to keep
#: it. 28,672 tokens for sounds have 0.6 MB.
MAX_ADDED_BYTES = 2**20
#: Of a normalizer's regular expressions on all added tokens, when the library reads them; it does 180 million in a
#: second, and mostly more. 6,400 tokens of 20 characters and the usual expressions take a few million.
MAX_ADDED_STEPS = 2**27
#: Of a pre-tokenizer. Published ones have up to 4: ByteLevel with a space in front, and Metaspace.
MAX_CUT_STRETCH = 16
#: Normalizers, pre-tokenizers, post-processors and decoders of one kind. Published ones have up to 20.
MAX_STEPS = 128
#: Tokens put around a text.
MAX_TOKENS_AROUND = 128
#: Of one token; published ones have up to 1,024.
MAX_TOKEN_CHARS = 2**14
#: Of a decoder, which usually makes less of a token.
MAX_DECODED_STRETCH = 4
_STRETCHES = {
    # One character of four bytes becomes three such.
    **dict.fromkeys(("NFC", "NFD"), 3.0),
    # One character of three bytes becomes 33 bytes.
    **dict.fromkeys(("NFKC", "NFKD"), 11.0),
    # Takes accents apart, makes lower case, and puts spaces around Chinese characters.
    "BertNormalizer": 3 * 2.0 * 2,
    **dict.fromkeys(("ByteLevel", "Lowercase", "Nmt"), 2.0),
    **dict.fromkeys(("Strip", "StripAccents"), 1.0),
}
#: Normalizers that make no text of plain letters, digits and signs longer.
_PLAIN_IN_ASCII = frozenset(("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents"))
#: An expression that is one plain character, at least so many times.
_REPEATED_CHARACTER = re.compile(r"[^\\.^$*+?{}\[\]()|]\{(\d{1,4}),\}")
_TRIE_SIZE_BYTES = 4
#: Pre-tokenizers that cut a text and leave it as it is.
_CUTTERS = frozenset(
    (
        *("BertPreTokenizer", "CharDelimiterSplit", "Digits", "FixedLength", "Punctuation", "Split", "UnicodeScripts"),
        *("Whitespace", "WhitespaceSplit"),
    )
)
#: Of a normalized text that is measured, bytes that count as one piece.
_PIECE_BYTES = 16

#: Characters of a regular expression, and brackets in brackets; published ones have up to 332, and 2.
MAX_PATTERN_CHARS = 2**13
_MAX_PATTERN_DEPTH = 16
#: Ways to match a text, but for repetitions: alternatives and options that follow each other. Published ones have up to
#: 16.
MAX_PATTERN_WAYS = 2**10
#: Repetitions that follow each other; published ones have up to 2.
MAX_PATTERN_REPETITIONS = 8
#: Characters, where a repetition "{3}" counts three times. The library writes small ones out.
_MAX_PATTERN_SIZE = 2**14
#: A group that is repeated and holds repetitions, and yet matches in one way: K-EXAONE's.
_ONE_WAY = (r"(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+", r"\p{L}+")
_GROUP = re.compile(r"\((?:\?(?:[:=!>]|<[=!]|<\w+>|[im]*(?:-[im]+)?:)|(?![?*]))")
_FLAGS = re.compile(r"\(\?[im]+\)")
_ESCAPE = re.compile(
    r"\\(?:[pP]\{[^{}]+\}|x\{[0-9A-Fa-f]+\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|[dDwWsShHbBAzZnrtfvaeRXNO]|[^A-Za-z0-9])"
)
_QUANTIFIER = re.compile(r"[*+?][?+]?|\{(\d*)(,?)(\d*)\}\??")


@dataclass(frozen=True, slots=True)
class Ways:
    """How a part of an expression matches.

    Attributes:
        choices: the product of its alternatives and options.
        repetitions: how many of its parts take as much of the text as they like.
        size: its characters, each as often as it must stand there.
    """

    choices: int = 1
    repetitions: int = 0
    size: int = 1

    @property
    def is_one(self) -> bool:
        return self.choices == 1 and not self.repetitions

    def steps(self, num_bytes: float) -> float:
        """Steps on a text of so many bytes, at most: from each place, and with each way to cut it."""
        return self.choices * min(self.size, num_bytes) * num_bytes ** (1 + self.repetitions)

    def then(self, other: Ways) -> Ways:
        """This, and then the other."""
        return Ways(
            min(self.choices * other.choices, 2**62), self.repetitions + other.repetitions, self.size + other.size
        )

    def alternatively(self, other: Ways) -> Ways:
        """This or the other."""
        return Ways(self.choices + other.choices, max(self.repetitions, other.repetitions), self.size + other.size)


@dataclass(frozen=True, slots=True)
class Growth:
    """What a tokenizer makes of a text at most.

    Attributes:
        normalized: bytes of the normalized text, for each byte.
        ids: ids, for each byte of the normalized text.
        patterns: how the alternatives of the normalizer's regular expressions match.
        normalizer: as JSON.
    """

    normalized: float
    ids: float
    patterns: tuple[Ways, ...] = ()
    normalizer: object = None


def check_backend(backend: tokenizers.Tokenizer) -> Growth:
    """Refuse a tokenizer that makes much of little; return how much it makes.

    Raises:
        LoadError: with the part and its bound.
    """
    parts = {
        "normalizer": backend.normalizer,
        "pre-tokenizer": backend.pre_tokenizer,
        "post-processor": backend.post_processor,
        "decoder": backend.decoder,
    }
    states = {name: _state(part) for name, part in parts.items()}
    patterns = dict[str, list[Ways]]()
    for name, state in states.items():
        require_few_steps(state, f"the tokenizer's {name}")
        patterns[name] = require_simple_patterns(state, f"the tokenizer's {name}")
    _require_text_once(states["post-processor"])
    # In a chain of post-processors, the second takes what the first made of one text for a pair.
    num_around = max(backend.num_special_tokens_to_add(is_pair) for is_pair in (False, True))
    if num_around > MAX_TOKENS_AROUND:
        raise LoadError(
            f"the tokenizer puts {num_around} tokens around a text, at most {MAX_TOKENS_AROUND} are allowed"
        )
    stretch = require_small_stretch(states["normalizer"], "the tokenizer")
    ids_per_byte = _ids_per_byte(states["pre-tokenizer"], backend.model)
    return Growth(stretch, ids_per_byte, tuple(patterns["normalizer"]), states["normalizer"])


def _require_text_once(post_processor: object) -> None:
    """Refuse a template that repeats the text."""
    for step in _steps(post_processor):
        for name in ("single", "pair"):
            texts = _texts_in(step.get(name))
            if len(texts) != len({*texts}):
                raise LoadError(
                    f"the tokenizer's post-processor has the text {len(texts)} times in its template '{name}', "
                    "expected each part of it once; a published tokenizer does nothing of the kind, so get the model "
                    "from a source that you trust"
                )


def _texts_in(template: object) -> list[str]:
    """Which of the texts each piece of a template stands for, where it stands for one."""
    pieces = [piece.get("Sequence") for piece in _list_of(template) if isinstance(piece, dict)]
    return [str(piece.get("id")) for piece in pieces if isinstance(piece, dict)]


def _ids_per_byte(pre_tokenizer: object, model: Any) -> float:
    num_chars, num_bytes = _cut(pre_tokenizer, 1.0, 1.0)
    if num_bytes > MAX_CUT_STRETCH:
        raise LoadError(
            f"the tokenizer's pre-tokenizer grows a text up to {num_bytes:.0f} times, at most {MAX_CUT_STRETCH} is "
            "allowed; a published tokenizer does nothing of the kind, so get the model from a source that you trust"
        )
    # Only BPE tells; of another model it is not known.
    if not getattr(model, "byte_fallback", True):
        return num_chars
    affixes = (getattr(model, name, None) for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    return num_bytes + num_chars * sum(map(_num_bytes, affixes))


def _cut(pre_tokenizer: object, num_chars: float, num_bytes: float) -> tuple[float, float]:
    """What a pre-tokenizer makes of so many characters and bytes, where each character may be a piece."""
    fields = pre_tokenizer if isinstance(pre_tokenizer, dict) else {}
    kind = fields.get("type")
    if pre_tokenizer is None or kind in _CUTTERS:
        return num_chars, num_bytes
    if kind == "Sequence":
        for part in _list_of(fields.get("pretokenizers")):
            num_chars, num_bytes = _cut(part, num_chars, min(num_bytes, 1e100))
        return num_chars, num_bytes
    if kind == "ByteLevel":
        # Each byte becomes a character of one byte or two.
        num_chars = num_bytes + (num_chars if fields.get("add_prefix_space", True) else 0.0)
        return num_chars, 2 * num_chars
    if kind == "Metaspace":
        # In front of each piece, and in place of a space.
        return 2 * num_chars, num_bytes * (1 + _num_bytes(fields.get("replacement")))
    raise LoadError(f"the tokenizer's pre-tokenizer is '{shorten(str(kind))}', which is not known")


def count_normalized(backend: tokenizers.Tokenizer, text: str) -> int:
    """Bytes of the normalized text, or a few more. Added tokens cut it as they do when it is encoded.

    Raises:
        whatever the library does, for `library_errors`.
    """
    piece = "piece"
    meter = tokenizers.Tokenizer(tokenizers.models.WordLevel({piece: 0}, unk_token=piece))
    meter.normalizer = backend.normalizer
    meter.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            # A character for each byte.
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            tokenizers.pre_tokenizers.FixedLength(_PIECE_BYTES),
        ]
    )
    meter.add_tokens([*backend.get_added_tokens_decoder().values()])
    (encoding,) = meter.encode_batch_fast([text], add_special_tokens=False)
    return _PIECE_BYTES * len(encoding)


def require_small_additions(
    tokens: Iterable[tuple[str, bool]], normalizers: Sequence[object], patterns: Sequence[Ways], where: object
) -> None:
    """Refuse added tokens that take much memory or time where the library prepares to look for them.

    Args:
        tokens: the text of each, and whether it is normalized.
        normalizers: as JSON, of small stretch; one of them is used.
        patterns: of the normalizers, as of `require_simple_patterns`.
        where: for the message.

    Raises:
        LoadError: with what they take.
    """
    num_bytes, num_steps = 0.0, 0.0
    for text, is_normalized in tokens:
        used = normalizers if is_normalized else ()
        length = max([normalized_bytes(normalizer, text, where) for normalizer in used], default=_num_bytes(text))
        num_bytes += length
        num_steps += sum(ways.steps(length) for ways in patterns) if is_normalized else 0.0
        if num_bytes > MAX_ADDED_BYTES:
            break
    for what, found, most in (("bytes", num_bytes, MAX_ADDED_BYTES), ("steps", num_steps, MAX_ADDED_STEPS)):
        if found > most:
            raise LoadError(
                f"{where}: the added tokens take {found:.0f} {what} and more when they are normalized, at most {most} "
                "are allowed; a published tokenizer takes less, so get the model from a source that you trust"
            )


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


def require_simple_patterns(part: object, what: str) -> list[Ways]:
    """Refuse a part of a tokenizer, as JSON, with a regular expression that matches in very many ways.

    Returns:
        The ways of each alternative of its expressions.

    Raises:
        LoadError: with the expression.
    """
    patterns = [step["Regex"] for step in _steps(part) if isinstance(step.get("Regex"), str)]
    return [ways for pattern in patterns for ways in _PatternReader(pattern, what).check()]


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


def normalized_bytes(normalizer: object, text: str, where: object, num_pieces: float = 1.0) -> float:
    """Bytes of a normalized text at most: counted where each step is simple, and by the stretch of those that are not.

    Args:
        normalizer: as JSON.
        num_pieces: into how many pieces added tokens cut the text, each of which something may be put in front of.
    """
    known: str | None = text
    num_bytes, num_added = float(_num_bytes(text)), 0.0
    heads, are_unknown = list[str](), False
    for step in _in_order(normalizer):
        stretch = _stretch(step, where)
        if step.get("type") == "Prepend":
            heads.append(str(step.get("prepend")))
            num_added += num_pieces * _num_bytes(step.get("prepend"))
            continue
        replaced = None if known is None else _replaced(step, known)
        if replaced is not None and len(replaced[0]) > 1 and num_pieces > 1:
            replaced = None  # It may stand in the text and in none of its pieces.
        if are_unknown or replaced is None or any(_may_change(head, *replaced) for head in heads):
            old, new = replaced or ("", "")
            # What is replaced may lie across the two.
            num_added = min(num_added * stretch + num_pieces * _num_bytes(new), 1e100) if heads else 0.0
            # What stands in front is another text now, which only a replacement tells.
            are_unknown = are_unknown or (bool(heads) and not old)
            heads += [new] if heads else []
        if known is None or replaced is None:
            known, num_bytes = None, min(num_bytes * stretch, 1e100)
            continue
        old, new = replaced
        num_bytes += known.count(old) * (_num_bytes(new) - _num_bytes(old)) if old else 0
        if num_bytes > MAX_NORMALIZED_BYTES:
            return num_bytes
        known = known.replace(old, new) if old else known
    return num_bytes + num_added


def _may_change(head: str, old: str, new: str) -> bool:
    """Whether what was put in front of a text takes part in a step as of `_replaced`."""
    return bool({*old} & {*head}) if old else not head.isascii()


def _in_order(normalizer: object) -> Iterator[Mapping[str, Any]]:
    """Its steps, as they are taken."""
    fields = normalizer if isinstance(normalizer, dict) else {}
    if fields.get("type") == "Sequence":
        for part in _list_of(fields.get("normalizers")):
            yield from _in_order(part)
    elif fields:
        yield fields


def _replaced(step: Mapping[str, Any], text: str) -> tuple[str, str] | None:
    """What a step replaces in a text by what, "" where it makes nothing longer; None where that is not known."""
    kind, pattern = step.get("type"), step.get("pattern")
    if kind == "Strip" or (text.isascii() and kind in _PLAIN_IN_ASCII):
        return "", ""
    old = pattern.get("String") if kind == "Replace" and isinstance(pattern, dict) else None
    return (old, str(step.get("content"))) if isinstance(old, str) and old else None


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


class _PatternReader:
    """Walks over the text of an expression once, as Oniguruma reads it. What it does not know, it refuses."""

    def __init__(self, text: str, where: str) -> None:
        self._shown = text
        self._text = text.replace(*_ONE_WAY)
        self._where = where
        self._at = 0
        self._depth = 0

    def check(self) -> list[Ways]:
        """The ways of each alternative. Raises LoadError."""
        if len(self._text) > MAX_PATTERN_CHARS:
            self._refuse(f"has {len(self._text)} characters, at most {MAX_PATTERN_CHARS} are allowed")
        flags = _FLAGS.match(self._text)
        self._at = 0 if flags is None else flags.end()
        found = []
        # The alternatives of a whole expression are tried one by one, and the first to match is taken.
        while True:
            found.append(self._branch())
            self._require_few(found[-1])
            if self._at == len(self._text):
                return found
            if self._text[self._at] == ")":
                self._not_read()
            self._at += 1

    def _require_few(self, ways: Ways) -> None:
        for what, found, most in (
            ("ways to match", ways.choices, MAX_PATTERN_WAYS),
            ("repetitions in a row", ways.repetitions, MAX_PATTERN_REPETITIONS),
            ("characters when its repetitions are written out", ways.size, _MAX_PATTERN_SIZE),
        ):
            if found > most:
                self._refuse(f"has {found} {what}, at most {most} are allowed")

    def _branch(self) -> Ways:
        """Up to a bar or a closing bracket, or the end."""
        ways = Ways(size=0)
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            ways = ways.then(self._item())
        return ways

    def _item(self) -> Ways:
        """A group, a class or a character, with the repetition behind it."""
        start = self._text[self._at]
        ways = Ways()
        if start == "(":
            ways = self._group()
        elif start == "[":
            self._skip_class()
        elif start == "\\":
            self._take(_ESCAPE)
        else:
            self._at += 1
        while (found := _QUANTIFIER.match(self._text, self._at)) is not None:
            self._at = found.end()
            ways = self._repeated(ways, found)
        return ways

    def _group(self) -> Ways:
        self._take(_GROUP)
        self._enter()
        ways = self._branch()
        while self._text.startswith("|", self._at):
            self._at += 1
            ways = ways.alternatively(self._branch())
        self._leave(")")
        return ways

    def _repeated(self, ways: Ways, found: re.Match[str]) -> Ways:
        low, comma, high = found[1], found[2], found[3]
        if found[0].startswith("?") or (low or "0", comma, high) == ("0", ",", "1"):
            return Ways(ways.choices + 1, ways.repetitions, ways.size)
        if not ways.is_one and not (found[0][0] in "*+" and self._ends_expression()):
            self._refuse("repeats a group that has alternatives or repetitions itself")
        num_times = max(1, *(int(number) for number in (low, high) if number)) if low or high else 1
        is_fixed = bool(low) and not comma and not found[0].endswith("?")
        return Ways(ways.choices, ways.repetitions + (not is_fixed), ways.size * num_times)

    def _ends_expression(self) -> bool:
        """Whether nothing behind this place can fail. So tiktoken's "\\p{N}{1,3}+" ends an alternative."""
        return self._depth == 0 and self._text[self._at : self._at + 1] in ("", "|")

    def _skip_class(self) -> None:
        self._at += 2 if self._text.startswith("[^", self._at) else 1
        self._enter()
        if self._text.startswith("]", self._at):
            self._not_read()
        while self._at < len(self._text) and self._text[self._at] != "]":
            if self._text[self._at] == "[":
                self._skip_class()
            elif self._text[self._at] == "\\":
                self._take(_ESCAPE)
            else:
                self._at += 1
        self._leave("]")

    def _enter(self) -> None:
        self._depth += 1
        if self._depth > _MAX_PATTERN_DEPTH:
            self._refuse(f"has more than {_MAX_PATTERN_DEPTH} brackets in brackets")

    def _leave(self, bracket: str) -> None:
        if not self._text.startswith(bracket, self._at):
            self._not_read()
        self._at += 1
        self._depth -= 1

    def _take(self, expected: re.Pattern[str]) -> None:
        found = expected.match(self._text, self._at)
        if found is None:
            self._not_read()
        self._at = found.end()

    def _not_read(self) -> NoReturn:
        self._refuse(f"is not read from character {self._at + 1} on, expected what published tokenizers use")

    def _refuse(self, reason: str) -> NoReturn:
        raise LoadError(
            f"{self._where}: the pattern '{shorten(self._shown)}' {reason}; it could take very long to match, so "
            "get the model from a source that you trust"
        )
