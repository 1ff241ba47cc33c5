"""The tokenizer that a GGUF file's metadata describes, as the `tokenizers` library's.

Two kinds exist: "gpt2", byte-level BPE whose words are cut by regular expressions known by a name, and "llama",
SentencePiece BPE, where a piece's score orders the merges. Names and expressions are llama.cpp's (src/llama-vocab.cpp).
Invariant: every id below the number of tokens decodes to its own text, and metadata that does not fit together is a
CheckpointError. It reads no file: the metadata comes as a mapping of plain Python values. What a text becomes is for
whoever runs the tokenizer, or writes it to a folder.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from converters.errors import CheckpointError
from converters.files import shown

_PREFIX = "tokenizer.ggml."
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
#: The longest tokens that are published are runs of some hundred spaces.
MAX_TOKEN_CHARS = 1024
#: Vocabularies of 260,000 are published; each token takes some 100 bytes, whatever its text.
MAX_TOKENS = 2**20
#: Of all tokens together; vocabularies of 260,000 have some 2 million. It bounds what finding their merges takes.
MAX_VOCABULARY_CHARS = 2**22
#: Merges, and the characters of their results, which the library copies; the same vocabularies have 500,000, of 8 each.
MAX_MERGES = 3 * 2**18
MAX_MERGED_CHARS = 2**24
#: Control tokens and user-defined ones, each of which is looked for in every text; published models have some 7,000.
MAX_WHOLE_TOKENS = 2**16
#: Models have one for tools, and one or two more.
MAX_NAMED_TEMPLATES = 64


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


#: Types whose text never comes of merging characters.
_NEVER_MERGED = frozenset((TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE))
#: Names of control tokens that end a turn; files made before `eot_token_id` existed have no other sign of them.
_END_OF_TURN = frozenset(
    (
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"),
        *("<EOT>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    )
)
#: Where this one exists, "<|end|>" ends a part of an answer and not the answer.
_END_OF_ANSWER = "<|return|>"


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut into words before merging.

    Attributes:
        splits: regular expressions; each cuts the pieces the one before left.
        ignore_merges: a word that is a token stays one, whatever the merges make of it.
        adds_bos: a text begins with the bos token if the file does not say.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The library's object, which also spells the pieces in the byte alphabet."""
        splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in self.splits]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BREAKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BREAKS}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BREAKS}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BREAKS}"
)
_SEED = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_BREAKS}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BREAKS}"
_GPT4O = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BREAKS}"
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")
_CJK = r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]+"
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_BREAKS}",
)

_SPLIT_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_PLAIN_GPT2 = PreTokenizer((_GPT2,))
_PLAIN_QWEN2 = PreTokenizer((_QWEN2,))
_PLAIN_LLAMA3 = PreTokenizer((_LLAMA3,))
_LLAMA3_BOS = PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True)
_PLAIN_GPT4O = PreTokenizer((_GPT4O,))

#: `tokenizer.ggml.pre` -> how it cuts.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer(_DEFAULT),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "lfm2", "midm-2.0"), _LLAMA3_BOS),
    "pixtral": _LLAMA3_BOS,
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _PLAIN_LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "stablelm2", "hunyuan", "grok-2"), _PLAIN_QWEN2),
    "qwen35": PreTokenizer((_QWEN35,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _SPLIT_DIGITS),
    **dict.fromkeys(
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "mellum", "gigachat"), _PLAIN_GPT2
    ),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), _PLAIN_GPT4O),
    "falcon": PreTokenizer(_FALCON),
    "seed-coder": PreTokenizer((_SEED,)),
    "deepseek-coder": PreTokenizer(_DEEPSEEK_CODER),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), PreTokenizer(_DEEPSEEK_V3)),
}


@dataclass(frozen=True)
class _Vocabulary:
    """The token lists, checked against each other.

    Attributes:
        tokens: text by id.
        types: TokenType by id.
        ids: id by text; of equal texts the first.
        others: text of the ids that `ids` lacks.
    """

    tokens: list[str]
    types: list[int]
    ids: dict[str, int]
    others: dict[int, str]

    def ids_of(self, *types: TokenType) -> list[int]:
        return [token_id for token_id, kind in enumerate(self.types) if kind in types]


@dataclass(frozen=True)
class GGUFTokenizer:
    """What the metadata says.

    Attributes:
        backend: the library's tokenizer, a fresh one.
        special_tokens: text by name ("bos_token", "eos_token", "unk_token", "pad_token").
        eos_token_ids: ids that end a sequence or a turn.
        other_tokens: text of the ids that the backend cannot hold, because their text is empty or another id's too.
        chat_template: value of `tokenizer.chat_template`, not checked; None without one.
        named_chat_templates: text by name, of `tokenizer.chat_template.NAME`.
    """

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    eos_token_ids: frozenset[int]
    other_tokens: dict[int, str]
    chat_template: Any
    named_chat_templates: dict[str, str]


def read_tokenizer(metadata: Mapping[str, Any]) -> GGUFTokenizer:
    """The tokenizer of a GGUF file.

    Args:
        metadata: the file's key-value pairs as plain Python values, at least those beginning with "tokenizer.".

    Raises:
        CheckpointError: naming the key, what it holds and what was expected.
    """
    kind = _value(metadata, "model", str)
    builders = {"gpt2": _byte_level_backend, "llama": _sentencepiece_backend}
    if kind not in builders:
        raise _bad("model", kind, " or ".join(f"'{name}'" for name in builders))
    vocabulary = _vocabulary(metadata)
    ends = {name: _token_id(metadata, name, vocabulary) for name in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    if kind == "llama":
        _set_sentencepiece_defaults(ends, vocabulary)
    with _library_errors():
        backend, adds_bos = builders[kind](metadata, vocabulary, ends)
        _add_whole_tokens(backend, vocabulary, ends)
        _set_ends(backend, metadata, ends, adds_bos)
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    return GGUFTokenizer(
        backend,
        special_tokens={names[end]: vocabulary.tokens[i] for end, i in ends.items() if end in names and i is not None},
        eos_token_ids=_eos_token_ids(vocabulary, ends),
        other_tokens=vocabulary.others,
        chat_template=metadata.get("tokenizer.chat_template"),
        named_chat_templates=_named_templates(metadata),
    )


@contextmanager
def _library_errors() -> Iterator[None]:
    """What the library raises, a panic of its Rust side included, as a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        # A Rust panic is a pyo3_runtime.PanicException, which derives from BaseException and cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"the GGUF file's tokenizer is unusable: {shown(error) or type(error).__name__}"
        ) from error


# Reading


def _bad(key: str, found: Any, expected: str) -> CheckpointError:
    what = shown(repr(found) if isinstance(found, str) else found)
    return CheckpointError(f"GGUF metadata {_PREFIX}{key} is {what}, expected {expected}")


def _value(metadata: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    value = metadata.get(_PREFIX + key, default)
    if value is default and default is not None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _bad(key, value, f"a value of type {kind.__name__}")
    return value


def _list(metadata: Mapping[str, Any], key: str, kinds: set[type], length: int | None = None) -> list[Any]:
    value = metadata.get(_PREFIX + key)
    names = " or ".join(sorted(kind.__name__ for kind in kinds))
    if not isinstance(value, list):
        raise _bad(key, value, f"a list of {names}")
    wrong = {*map(type, value)} - kinds
    if wrong:
        raise _bad(key, f"a list with {wrong.pop().__name__}", f"a list of {names}")
    if length is not None and len(value) != length:
        raise _bad(key, f"a list of {len(value)}", f"one entry for each of the {length} tokens")
    return value


def _vocabulary(metadata: Mapping[str, Any]) -> _Vocabulary:
    tokens: list[str] = _list(metadata, "tokens", {str})
    if not 0 < len(tokens) <= MAX_TOKENS:
        raise _bad("tokens", f"a list of {len(tokens)}", f"1 to {MAX_TOKENS} tokens")
    longest = max(map(len, tokens))
    if longest > MAX_TOKEN_CHARS:
        raise _bad("tokens", f"a list with a token of {longest} characters", f"at most {MAX_TOKEN_CHARS}")
    if sum(map(len, tokens)) > MAX_VOCABULARY_CHARS:
        raise _bad("tokens", f"{sum(map(len, tokens))} characters in all", f"at most {MAX_VOCABULARY_CHARS}")
    types = [TokenType.NORMAL.value] * len(tokens)
    if _PREFIX + "token_type" in metadata:
        types = _list(metadata, "token_type", {int}, len(tokens))
    ids: dict[str, int] = {}
    others: dict[int, str] = {}
    for token_id, text in enumerate(tokens):
        if not text or ids.setdefault(text, token_id) != token_id:
            others[token_id] = text
    return _Vocabulary(tokens, types, ids, others)


def _token_id(metadata: Mapping[str, Any], name: str, vocabulary: _Vocabulary) -> int | None:
    key = f"{name}_token_id"
    if _PREFIX + key not in metadata:
        return None
    token_id: int = _value(metadata, key, int)
    if not 0 <= token_id < len(vocabulary.tokens):
        raise _bad(key, token_id, f"an id below {len(vocabulary.tokens)}, the number of tokens")
    return token_id


def _set_sentencepiece_defaults(ends: dict[str, int | None], vocabulary: _Vocabulary) -> None:
    """A SentencePiece file that does not name its ends has SentencePiece's: <unk> 0, <s> 1, </s> 2."""
    defaults = (("unknown", 0, TokenType.UNKNOWN), ("bos", 1, TokenType.CONTROL), ("eos", 2, TokenType.CONTROL))
    for name, token_id, kind in defaults:
        if ends[name] is None and vocabulary.types[token_id : token_id + 1] == [kind]:
            ends[name] = token_id


def _eos_token_ids(vocabulary: _Vocabulary, ends: Mapping[str, int | None]) -> frozenset[int]:
    given = {ends[name] for name in ("eos", "eot", "eom")} - {None}
    names = _END_OF_TURN - {"<|end|>"} if _END_OF_ANSWER in vocabulary.ids else _END_OF_TURN
    known = {i for i in vocabulary.ids_of(TokenType.CONTROL) if vocabulary.tokens[i] in names}
    return frozenset(token_id for token_id in given | known if token_id is not None)


def _named_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """`tokenizer.chat_template.NAME` for each text of `tokenizer.chat_templates`."""
    named = metadata.get("tokenizer.chat_templates", [])
    names = named[:MAX_NAMED_TEMPLATES] if isinstance(named, list) else []
    texts = {name: metadata.get(f"tokenizer.chat_template.{name}") for name in names if isinstance(name, str)}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


# Building


def _byte_level_backend(
    metadata: Mapping[str, Any], vocabulary: _Vocabulary, ends: Mapping[str, int | None]
) -> tuple[tokenizers.Tokenizer, bool]:
    """Byte-level BPE, and whether it adds bos by default."""
    name = _value(metadata, "pre", str, "default")
    if name not in PRE_TOKENIZERS:
        raise _bad("pre", name, "one of " + ", ".join(sorted(PRE_TOKENIZERS)))
    pre_tokenizer = PRE_TOKENIZERS[name]
    merges = []
    listed = _list(metadata, "merges", {str})
    if len(listed) > MAX_MERGES:
        raise _bad("merges", f"a list of {len(listed)}", f"at most {MAX_MERGES}")
    for merge in listed:
        left, space, right = merge.partition(" ")
        if not (left and space and right) or left + right not in vocabulary.ids:
            raise _bad("merges", merge, "two tokens with a space between, whose joint text is a token")
        merges.append((left, right))
    model = models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=pre_tokenizer.ignore_merges)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer.build()
    backend.decoder = decoders.ByteLevel()
    return backend, pre_tokenizer.adds_bos


def _sentencepiece_backend(
    metadata: Mapping[str, Any], vocabulary: _Vocabulary, ends: Mapping[str, int | None]
) -> tuple[tokenizers.Tokenizer, bool]:
    """SentencePiece BPE with byte fallback, and whether it adds bos by default."""
    scores: list[float] = _list(metadata, "scores", {float, int}, len(vocabulary.tokens))
    if any(math.isnan(score) for score in scores):
        raise _bad("scores", "a list with NaN", "numbers")
    unknown = ends["unknown"]
    model = models.BPE(
        vocab=vocabulary.ids,
        merges=_merges_of_scores(vocabulary, scores),
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    adds_space = _value(metadata, "add_space_prefix", bool, True)
    spaces = normalizers.Replace(" ", _SPACE)
    normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if adds_space else spaces
    backend.normalizer = normalizer
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if adds_space else steps)
    return backend, True


def _merges_of_scores(vocabulary: _Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """Every pair of tokens whose joint text is a token, the best-scored first.

    SentencePiece merges the pair whose result scores best, and keeps no list; ties are ordered as transformers'
    conversion orders them (longer left part, then longer right part, then ids).
    """
    ids = {text: i for text, i in vocabulary.ids.items() if vocabulary.types[i] not in _NEVER_MERGED}
    # Of each merge the result, the length of its left part, and both parts. Half a million tuples would take 100 MB.
    results, cuts, lefts, rights = array("i"), array("i"), array("i"), array("i")
    merged_chars = 0
    for text, token_id in ids.items():
        for cut in range(1, len(text)):
            left = ids.get(text[:cut])
            right = ids.get(text[cut:]) if left is not None else None
            if left is not None and right is not None:
                results.append(token_id)
                cuts.append(cut)
                lefts.append(left)
                rights.append(right)
                merged_chars += len(text)
        if len(results) > MAX_MERGES or merged_chars > MAX_MERGED_CHARS:
            found = f"a list with {len(results)} merges or more, of {merged_chars} characters"
            raise _bad("tokens", found, f"at most {MAX_MERGES}, of {MAX_MERGED_CHARS}")
    by_result, left_chars = np.asarray(results), np.asarray(cuts)
    score = np.asarray(scores, dtype=np.float64)[by_result]
    right_chars = np.asarray([*map(len, vocabulary.tokens)])[by_result] - left_chars
    order = np.lexsort((by_result, -right_chars, -left_chars, -score)).tolist()
    tokens = vocabulary.tokens
    return [(tokens[lefts[place]], tokens[rights[place]]) for place in order]


def _add_whole_tokens(backend: tokenizers.Tokenizer, vocabulary: _Vocabulary, ends: Mapping[str, int | None]) -> None:
    """Control tokens become special ones, user-defined tokens plain ones that are matched whole."""
    special = {*vocabulary.ids_of(TokenType.CONTROL, TokenType.UNKNOWN), *(i for i in ends.values() if i is not None)}
    plain = set(vocabulary.ids_of(TokenType.USER_DEFINED)) - special
    if len(special) + len(plain) > MAX_WHOLE_TOKENS:
        raise _bad("token_type", f"a list with {len(special) + len(plain)} whole tokens", f"at most {MAX_WHOLE_TOKENS}")
    added = [
        AddedToken(vocabulary.tokens[token_id], special=token_id in special, normalized=False)
        for token_id in sorted(special | plain)
        if token_id not in vocabulary.others
    ]
    backend.add_tokens(added)


def _set_ends(
    backend: tokenizers.Tokenizer, metadata: Mapping[str, Any], ends: Mapping[str, int | None], adds_bos: bool
) -> None:
    """Let the post-processor put the tokens that the file asks for around each text."""
    wanted = {
        "bos": _value(metadata, "add_bos_token", bool, adds_bos),
        "eos": _value(metadata, "add_eos_token", bool, False),
    }
    # The ids go under names of our own: a token's text could be read as part of the library's template language.
    tokens = [
        {"id": name, "ids": [ends[name]], "tokens": [name]}
        for name in wanted
        if wanted[name] and ends[name] is not None
    ]
    around = {token["id"] for token in tokens}
    template = [name for name in ("bos", "$A", "eos") if name == "$A" or name in around]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
