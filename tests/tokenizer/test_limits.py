"""How far a tokenizer may stretch a text: what published ones do passes, and each bound is met."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from converters.encoder import HubEncoder
from converters.errors import CheckpointError
from converters.gguf_tokenizer import PRE_TOKENIZERS
from converters.open import open_checkpoint
from qengine.commands import generate
from qengine.commands.quantize import _open_tokenizer
from qengine.commands.talking import LocalTalker
from qengine.errors import LoadError, RequestError
from qengine.llm import LLM
from qengine.serving.limits import LIMITS
from qengine.tokenizer import Tokenizer, load_tokenizer
from qengine.tokenizer.files import is_there, read_bytes, read_json
from qengine.tokenizer.limits import (
    MAX_ADDED_BYTES,
    MAX_IDS,
    MAX_NORMALIZED_BYTES,
    check_backend,
    count_normalized,
    normalized_bytes,
    require_simple_patterns,
    require_small_stretch,
)
from qengine.tokenizer.rust_errors import MAX_REASON_LEN, shorten
from qengine.tokenizer.tokenizer import CHARS_PER_TOKEN, most_chars
from qengine.tokenizer.tokenizer_json import check_tokenizer_json
from tests.engine.fixtures import path as fixture

FOLDER = Path(fixture("llama-gptq-sym-g128"))
SPACE = "\u2581"


def _charsmap(*texts: str) -> str:
    trie = bytes(8)
    data = len(trie).to_bytes(4, "little") + trie + b"".join(text.encode() + b"\0" for text in texts)
    return base64.b64encode(data).decode()


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


LLAMA = [{"type": "Prepend", "prepend": SPACE}, _replace({"String": " "}, SPACE)]
#: The longest text in SentencePiece's own map has 33 bytes.
MAP = {"type": "Precompiled", "precompiled_charsmap": _charsmap("a", "x" * 33, "bc")}


@pytest.mark.parametrize(
    ("normalizer", "stretch"),
    [
        (None, 1),
        ({"type": "NFC"}, 3),
        ({"type": "NFKC"}, 11),
        (_replace({"String": " "}, SPACE), 3),
        ({"type": "Sequence", "normalizers": LLAMA}, 12),
        ({"type": "Sequence", "normalizers": [MAP, _replace({"Regex": " {2,}"}, " ")]}, 33),
        ({"type": "Sequence", "normalizers": [MAP, _replace({"Regex": " {2,}"}, SPACE)]}, 49.5),
        ({"type": "Sequence", "normalizers": [{"type": "Lowercase"}, {"type": "Strip"}]}, 2),
    ],
)
def test_normalizers_of_published_tokenizers_pass(normalizer: Any, stretch: float) -> None:
    assert require_small_stretch(normalizer, "it") == stretch


@pytest.mark.parametrize(
    "normalizer",
    [
        _replace({"String": "a"}, "b" * 65),
        _replace({"String": ""}, "b" * 65),
        _replace({"Regex": "a*"}, "b" * 64),
        _replace({"Regex": "a{0,}"}, "b" * 64),
        {"type": "Prepend", "prepend": "b" * 64},
        {"type": "Precompiled", "precompiled_charsmap": _charsmap("a", "b" * 65)},
        {"type": "Precompiled", "precompiled_charsmap": _charsmap("a", "b" * 80)[:-4]},
        {"type": "Sequence", "normalizers": [{"type": "NFKD"}, {"type": "NFKD"}]},
        {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [LLAMA[0]] * 4}]},
    ],
)
def test_normalizers_that_make_much_are_refused(normalizer: Any) -> None:
    with pytest.raises(LoadError, match="grows a text up to"):
        require_small_stretch(normalizer, "it")


@pytest.mark.parametrize(
    "normalizer", [{"type": "Later"}, {"type": 5}, {}, [], "NFC", {"type": "Sequence", "normalizers": [5]}]
)
def test_normalizers_that_are_not_known_are_refused(normalizer: Any) -> None:
    with pytest.raises(LoadError, match="not known"):
        require_small_stretch(normalizer, "it")


def test_a_map_that_makes_much_is_what_the_library_makes_of_it() -> None:
    """The stretch of a map is met: a byte becomes the whole text."""
    real = normalizers.Precompiled(base64.b64decode(_one_letter_map("b" * 40)))
    assert real.normalize_str("aaaa") == "b" * 160
    state = {"type": "Precompiled", "precompiled_charsmap": _one_letter_map("b" * 40)}
    assert require_small_stretch(state, "it") == 40


def _one_letter_map(text: str) -> str:
    """A double-array trie that knows "a" alone, as a leaf that points at offset 0 of the texts."""
    units = [0] * 256
    offset = 1
    units[0] = offset << 10
    units[offset ^ ord("a")] = ord("a") | 1 << 8 | (offset ^ ord("a") ^ 2) << 10
    units[2] = 1 << 31
    trie = b"".join(unit.to_bytes(4, "little") for unit in units)
    return base64.b64encode(len(trie).to_bytes(4, "little") + trie + text.encode() + b"\0").decode()


def test_a_prompt_is_no_longer_than_can_be_normalized() -> None:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    backend.decoder = decoders.ByteLevel()
    backend.normalizer = normalizers.Replace("a", "a" * 60)
    tokenizer = Tokenizer(backend)
    assert len(tokenizer.encode("a" * 100)) == 6000
    with pytest.raises(RequestError, match="60 times as many") as caught:
        tokenizer.encode("a" * (MAX_NORMALIZED_BYTES // 60 + 1))
    assert caught.value.param == "prompt"
    assert caught.value.code == "context_length_exceeded"


def test_a_prompt_has_no_more_ids_than_the_bound() -> None:
    """The bound is by what the normalizer makes of this text, not by what it could make of another."""
    backend = tokenizers.Tokenizer(models.BPE({"a": 0}, [], unk_token="a", fuse_unk=True))
    backend.decoder = decoders.ByteLevel()
    backend.normalizer = normalizers.Replace("a", "b" * 60)
    tokenizer = Tokenizer(backend)
    num_chars = MAX_IDS // 60 + 1
    assert tokenizer.encode("c" * num_chars) == [0]
    with pytest.raises(RequestError, match=f"at most about {MAX_IDS // 60}"):
        tokenizer.encode("a" * num_chars)
    plain = Tokenizer(_backend(None))
    with pytest.raises(RequestError, match=f"at most about {MAX_IDS}"):
        plain.encode("a" * (MAX_IDS + 1))


@pytest.mark.parametrize("num_special", [0, 2000])
def test_what_a_simple_normalizer_makes_of_a_text_is_counted(num_special: int) -> None:
    """Llama 2's could make a text twelve times as long, and makes one of words half as long again."""
    backend = _backend(None)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.add_special_tokens(["<s>"])
    text = "word " * 1000 + "<s>x" * num_special
    pieces = "word " * 1000 + "x" * num_special
    exact = sum(len(backend.normalizer.normalize_str(piece).encode()) for piece in text.split("<s>"))
    growth = check_backend(backend)
    found = normalized_bytes(growth.normalizer, text, "it", 1 + len(text) / 3)
    assert exact <= found <= 4 * len(text)
    assert found < growth.normalized * len(pieces) / 2


@pytest.mark.parametrize(
    "steps",
    [
        [normalizers.Prepend("a"), normalizers.Replace("a", "bb"), normalizers.Replace("b", "ccc")],
        [normalizers.Replace("x", "ab"), normalizers.Prepend("a"), normalizers.Replace("ax", "y" * 9)],
        [
            normalizers.Prepend("a"),
            normalizers.Replace("ax", "y" * 9),
            normalizers.NFC(),
            normalizers.Replace("y", "zz"),
        ],
        [normalizers.Prepend("\ufdfa"), normalizers.NFKC(), normalizers.Replace(" ", "__")],
        [normalizers.NFKC(), normalizers.Replace("\u2581", "abc"), normalizers.Prepend("q"), normalizers.Lowercase()],
        [normalizers.Replace(Regex("."), "zz"), normalizers.Replace("z", "yyy"), normalizers.Strip()],
        [
            normalizers.Replace("a", ""),
            normalizers.Prepend("a"),
            normalizers.Prepend("b"),
            normalizers.Replace("ba", "c"),
        ],
    ],
    ids=range(7),
)
@pytest.mark.parametrize("text", ["x", "axa", "\ufdfa \u2581 A", "aaa"])
def test_what_is_counted_is_no_less_than_what_the_library_makes(steps: list[Any], text: str) -> None:
    backend = _backend(None)
    backend.normalizer = normalizers.Sequence(steps)
    made = len(backend.normalizer.normalize_str(text).encode())
    assert made <= normalized_bytes(json.loads(backend.normalizer.__getstate__()), text, "it")


def test_what_only_the_whole_text_holds_is_not_replaced() -> None:
    backend = _backend(None)
    backend.normalizer = normalizers.Sequence([normalizers.Replace("axa", ""), normalizers.Replace("a", "b" * 60)])
    backend.add_special_tokens(["x"])
    text = "axa" * 100
    made = sum(len(backend.normalizer.normalize_str(piece)) for piece in text.split("x"))
    growth = check_backend(backend)
    assert made == 200 * 60
    assert normalized_bytes(growth.normalizer, text, "it", 101) >= made


@pytest.mark.parametrize("kind", ["NFC", "NFD", "NFKC", "NFKD"])
def test_plain_added_tokens_count_as_they_are(kind: str) -> None:
    token = {"id": 0, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    sounds = [{**token, "id": number, "content": f"<custom_token_{number}>"} for number in range(28_672)]
    check_tokenizer_json(_json(added_tokens=sounds, normalizer={"type": kind}), "it")
    for text in ("plain <tag>", "\u00c5ngstr\u00f6m \ufdfa"):
        normalizer = getattr(normalizers, kind)()
        made = len(normalizer.normalize_str(text).encode())
        assert made <= normalized_bytes({"type": kind}, text, "it")


def test_a_text_is_counted_as_it_is_cut() -> None:
    backend = _backend(None)
    backend.normalizer = normalizers.Prepend("b" * 50)
    backend.add_special_tokens(["x"])
    num_bytes = 51 * 100 + 100
    assert num_bytes <= count_normalized(backend, "ax" * 100) <= 2 * num_bytes
    assert count_normalized(backend, "a" * 1000) <= 1050 + 16
    assert count_normalized(_backend(None), "\u00e9" * 1000) == 2000


def _backend(pre_tokenizer: pre_tokenizers.PreTokenizer | None, **options: Any) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0}, [], unk_token="a", **options))
    backend.decoder = decoders.ByteLevel()
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    return backend


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@pytest.mark.parametrize(
    ("pre_tokenizer", "options", "ids"),
    [
        (None, {}, 1),
        (None, {"byte_fallback": True}, 1),
        (None, {"byte_fallback": True, "continuing_subword_prefix": "##"}, 3),
        (BYTE_LEVEL, {}, 1),
        (BYTE_LEVEL, {"byte_fallback": True}, 2),
        (pre_tokenizers.ByteLevel(), {}, 2),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(), BYTE_LEVEL]), {}, 1),
        (pre_tokenizers.Sequence([BYTE_LEVEL, BYTE_LEVEL]), {}, 2),
        (pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]), {}, 2),
        (pre_tokenizers.Metaspace(), {"byte_fallback": True}, 4),
    ],
)
def test_the_ids_of_a_byte_are_bounded(
    pre_tokenizer: pre_tokenizers.PreTokenizer | None, options: dict[str, Any], ids: float
) -> None:
    backend = _backend(pre_tokenizer, **options)
    assert check_backend(backend).ids == ids
    for text in ("b c " * 10, "\u00e9" * 10, "\U0001f642"):
        assert len(backend.encode(text)) <= ids * len(text.encode())


def test_a_pre_tokenizer_that_makes_much_is_refused() -> None:
    """Each of these doubles the text that the one before made."""
    with pytest.raises(LoadError, match="pre-tokenizer grows a text up to 1048576 times"):
        Tokenizer(_backend(pre_tokenizers.Sequence([BYTE_LEVEL] * 20)))
    marks = [pre_tokenizers.Metaspace(mark) for mark in "abcde"]
    with pytest.raises(LoadError, match="pre-tokenizer grows a text up to 32 times"):
        Tokenizer(_backend(pre_tokenizers.Sequence(marks)))


def test_a_template_has_the_text_once() -> None:
    bos = ("<s>", 0)
    backend = _backend(None)
    published = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[bos])
    backend.post_processor = processors.Sequence([processors.ByteLevel(), published])
    assert Tokenizer(backend).encode("b") == [0, 0]
    ends = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    many = processors.TemplateProcessing(single="$A", pair=["$A"] * 40 + ["$B"], special_tokens=[])
    burst = {"id": "<s>", "ids": [0] * 129, "tokens": ["a"] * 129}
    pairs = processors.TemplateProcessing(single="$A", pair="$A $B <s>", special_tokens=[burst])
    for steps, message in (
        ([processors.TemplateProcessing(single=["$A"] * 55, special_tokens=[])], r"the text 55 times .* 'single'"),
        ([ends, many], r"the text 41 times .* 'pair'"),
        ([ends, pairs], "129 tokens|130 tokens"),
    ):
        backend.post_processor = processors.Sequence(steps)
        with pytest.raises(LoadError, match=message):
            Tokenizer(backend)


class _RenderedError(Exception):
    """With the longest prompt that was allowed."""


def _chat_engine() -> Any:
    def render_chat(messages: Any, *, max_chars: int, **options: Any) -> str:
        raise _RenderedError(max_chars)

    return SimpleNamespace(info=SimpleNamespace(max_model_len=64), tokenizer=SimpleNamespace(render_chat=render_chat))


def _generate() -> None:
    settings: Any = SimpleNamespace(prompts=["x"], use_chat_template=True, sampling=None)
    generate._make_requests(_chat_engine(), settings)


def _talk() -> None:
    params: Any = None
    LocalTalker(_chat_engine(), params).answer([{"role": "user", "content": "x"}], print)


def _chat() -> None:
    llm = object.__new__(LLM)
    llm.engine = _chat_engine()
    llm.chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("call", [_generate, _talk, _chat])
def test_chats_in_this_process_are_as_long_as_a_servers(
    call: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template is the model's: it may write as much as the context could take."""
    assert LIMITS.prompt_chars_per_token == CHARS_PER_TOKEN
    monkeypatch.setattr(generate, "sampling_params", lambda engine, settings: None)
    with pytest.raises(_RenderedError) as caught:
        call()
    assert caught.value.args == (2**16,)  # Of few tokens, a text is not refused by its length.
    assert most_chars(2**16) == 2**16 * CHARS_PER_TOKEN


# Regular expressions

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_REST = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PUBLISHED = {
    **{f"{name} {place}": text for name, each in PRE_TOKENIZERS.items() for place, text in enumerate(each.splits)},
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
        r"|\s+(?!\S)|\s"
    ),
    "clip": r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    "bloom": " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+",
    "kimi-k2": (
        rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|{_REST}"
    ),
    "superbpe": r"(?=(\d{3})+(?!\d))",
    "tiny-aya": r"\d{1,3}(?=(?:\d{3})*\b)",
    "k-exaone": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|{_REST}",
    "spaces": r" {2,}",
    "quotes": "``|''",
    "flags": "(?i)'(?:ll|ve)",
    "flags off": r"(?i-m:a)(?-i:b)|\R+|\X",
    "names and numbers": r"[A-Z]?[a-z]+[0-9]*\s*[._-]*\s*",
    "classes": r"(?<=\S)[^[:alpha:]\]\[]+|\x0A|\x{4E00}|\u3000",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_patterns_of_published_tokenizers_pass(name: str) -> None:
    Regex(PUBLISHED[name])
    require_simple_patterns({"pretokenizers": [{"type": "Split", "pattern": {"Regex": PUBLISHED[name]}}]}, "it")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(?:(?:a|a){21}b)|a", "repeats a group"),
        (r"(a+)+b", "repeats a group"),
        (r"(?:a?){30}b", "repeats a group"),
        (r"(?:a|a){21,}", "repeats a group"),
        (r"(?:a|a){2,}+", "repeats a group"),
        (r"a{1,3}+b", "repeats a group"),
        (r"(?:\p{N}{1,3}+|x)b", "repeats a group"),
        (r"(?:(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+)+b", "repeats a group"),
        ("(?:a|a)" * 21 + "b|a", "2097152 ways to match"),
        ("a?" * 21 + "b", "2097152 ways to match"),
        ("a*" * 9 + "b", "9 repetitions in a row"),
        (r"(?:(?:a{1000}){1000}){1000}", "1000000000 characters"),
        ("(" * 40 + ")" * 40, "brackets in brackets"),
        ("a" * 8193, "8193 characters"),
        (r"(?<x>(?:a|a))\g<x>", "not read from character 14"),
        (r"(a)\1", "not read from character 4"),
        ("(?x)a # (", "not read from character 1 "),
        ("(?#()(?:a|a){9}", "not read from character 1 "),
        (r"\c((?:a|a)", "not read from character 1 "),
        ("[]a](?:a|a){9}]", "not read from character 2 "),
        ("(?~a)", "not read from character 1 "),
        ("a)", "not read from character 2 "),
        ("(a", "not read from character 3 "),
        ("[a", "not read from character 3 "),
    ],
)
def test_patterns_that_match_in_very_many_ways_are_refused(pattern: str, message: str) -> None:
    part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    with pytest.raises(LoadError, match=message):
        require_simple_patterns(part, "it")
    with pytest.raises(LoadError, match=message):
        check_tokenizer_json(_json(pre_tokenizer=part), "it")


def test_a_pattern_is_looked_at_whatever_made_the_tokenizer() -> None:
    with pytest.raises(LoadError, match=r"pre-tokenizer: the pattern .* repeats a group"):
        Tokenizer(_backend(pre_tokenizers.Split(Regex("(a+)+b"), "isolated")))


def test_an_expression_that_takes_too_long_ends_the_request() -> None:
    """The library's own bound, for what matches in few ways and yet in a power of the text's length."""
    tokenizer = Tokenizer(_backend(pre_tokenizers.Split(Regex("a*a*a*$"), "isolated")))
    with pytest.raises(RequestError, match="retry-limit"):
        tokenizer.encode("a" * 1000 + "!")


def test_short_texts_are_encoded_by_the_call_that_lets_other_threads_run() -> None:
    tokenizer = Tokenizer(_backend(None))
    calls: list[list[str]] = []

    class Recording:
        def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
            calls.append(texts)
            return backend.encode_batch_fast(texts, **options)

    backend, tokenizer._backend = tokenizer._backend, Recording()
    assert tokenizer.encode("aa") == [0, 0]
    assert calls == [["aa"]]


def _json(**parts: Any) -> bytes:
    whole = json.loads((FOLDER / "tokenizer.json").read_text())
    return json.dumps({**whole, **parts}).encode()


def test_a_part_is_found_however_its_key_is_spelled() -> None:
    data = _json(normalizer=_replace({"String": "a"}, "b" * 100))
    for spelled in (rb'"\u006eormalizer"', rb'"\u006E\u006frmalizer"', b'"normalizer" \n\t'):
        with pytest.raises(LoadError, match="grows a text"):
            check_tokenizer_json(data.replace(b'"normalizer"', spelled), "it")
    with pytest.raises(LoadError, match="grows a text"):
        check_tokenizer_json(data[:-1] + b', "normalizer": null}', "it")
    with pytest.raises(LoadError, match="a key occurs twice"):
        check_tokenizer_json(data.replace(b'"type": "Replace"', b'"type": "NFC", "type": "Replace"'), "it")


def test_words_of_a_vocabulary_are_no_parts() -> None:
    vocab = {"normalizer": 0, "decoder": 1, "added_tokens": 2, 'say "decoder": x': 3, "pre_tokenizer": 4}
    data = _json(model={"type": "BPE", "vocab": vocab, "merges": []})
    check_tokenizer_json(data, "it")
    assert tokenizers.Tokenizer.from_buffer(data).get_vocab()["decoder"] == 1


def test_added_tokens_and_the_normalizer_are_bounded_together() -> None:
    token = {"id": 0, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    added = [{**token, "id": number, "content": f"{number:04}aaaa" * 1000} for number in range(300)]
    normalizer = _replace({"String": "a"}, "b" * 60)
    fitting, longer = added[: MAX_ADDED_BYTES // 8000], added[: MAX_ADDED_BYTES // 8000 + 1]
    check_tokenizer_json(_json(added_tokens=fitting), "it")
    check_tokenizer_json(_json(added_tokens=added[:4], normalizer=normalizer), "it")
    unchanged = [{**token, "normalized": False} for token in fitting]
    check_tokenizer_json(_json(added_tokens=unchanged, normalizer=normalizer), "it")
    for tokens, parts in ((longer, {}), (added[:5], {"normalizer": normalizer})):
        with pytest.raises(LoadError, match="added tokens take"):
            check_tokenizer_json(_json(added_tokens=tokens, **parts), "it")


@pytest.mark.parametrize("pattern", [r"a*b", r"a*a*b", r"a*a*a*b", r"(?:a|a)(?:a|a)a*b"])
def test_added_tokens_and_the_patterns_of_a_normalizer_are_bounded_together(pattern: str) -> None:
    """The library normalizes them while it reads the file: a token of 16,000 would take these hours, or minutes."""
    token = {"id": 0, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    normalizer = _replace({"Regex": pattern}, "")
    short = [{**token, "id": number, "content": f"<{number:04}>"} for number in range(6400)]
    check_tokenizer_json(_json(added_tokens=short, normalizer=normalizer), "it")
    long = [{**token, "content": "a" * 16_000}]
    with pytest.raises(LoadError, match=r"added tokens take \d+ steps"):
        check_tokenizer_json(_json(added_tokens=long, normalizer=normalizer), "it")
    check_tokenizer_json(_json(added_tokens=[{**long[0], "normalized": False}], normalizer=normalizer), "it")


# Files


def test_only_regular_files_of_their_size_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bytes(tmp_path / "file", 5) == b"12345"
    assert not is_there(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe")
    for name, most, message in (
        ("file", 4, "at most 4"),
        ("pipe", 5, "not a regular file"),
        (".", 5, "cannot read|not a regular file"),
        ("x" * 300, 5, "cannot read"),
        ("missing", 5, "cannot read"),
    ):
        with pytest.raises(LoadError, match=message):
            read_bytes(tmp_path / name, most)
    with pytest.raises(LoadError, match="gives others"):
        read_bytes(Path("/proc/self/status"), 10_000)
    with pytest.raises(LoadError, match="cannot read"):
        is_there(tmp_path / ("x" * 300))


def test_a_configuration_has_few_values(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [' + "0," * 300_000 + "0]}")
    with pytest.raises(LoadError, match="values"):
        read_json(tmp_path / "a.json")


def test_a_conversion_reads_nothing_beside_the_folder(tmp_path: Path) -> None:
    """transformers would take the paths of files from tokenizer_config.json."""
    whole = json.loads((FOLDER / "tokenizer.json").read_text())["model"]
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder, vocab in ((inside, whole["vocab"]), (outside, {"evil": 0})):
        folder.mkdir()
        merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in whole["merges"]]
        (folder / "vocab.json").write_text(json.dumps(vocab))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges] if folder == inside else []))
    (inside / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "vocab_file": str(outside / "vocab.json")})
    )
    tokenizer = load_tokenizer(str(inside))
    assert tokenizer.vocab_size >= len(whole["vocab"])
    assert tokenizer.encode("evil") != [0]


def test_a_reason_is_cut_before_it_is_taken_apart() -> None:
    assert len(shorten("a " * 10_000_000)) == MAX_REASON_LEN


# Calibration


def test_calibration_runs_no_template_without_bounds(tmp_path: Path) -> None:
    for file in FOLDER.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.jinja").write_text(
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    )
    source = open_checkpoint(tmp_path)
    engines, plain = _open_tokenizer(source, tmp_path), HubEncoder.open(source, tmp_path)
    assert isinstance(engines, Tokenizer)
    assert plain.chat_template is None
    assert plain.encode("Hello") == engines.encode("Hello")
    with pytest.raises(CheckpointError, match="qengine quantize"):
        plain.render_chat([])


def test_calibration_reads_sound_files_alone(tmp_path: Path) -> None:
    for file in FOLDER.iterdir():
        shutil.copy(file, tmp_path)
    source = open_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        HubEncoder.open(source, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="at most"):
        HubEncoder.open(source, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text("[")
    with pytest.raises(CheckpointError, match="no tokenizer can be made"):
        HubEncoder.open(source, tmp_path)
