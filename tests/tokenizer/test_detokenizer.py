"""Incremental text equals text decoded at once; stop strings are found by their simple definition."""
# ruff: noqa: RUF001  (scripts of the world)

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from qengine.errors import LoadError
from qengine.tokenizer import IncrementalDetokenizer, Tokenizer
from qengine.tokenizer.detokenizer import StopMatcher
from qengine.tokenizer.token_bytes import DecodingRule, byte_alphabet, decode_bytes, decoding_rule

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
SAMPLES = (
    "plain English text, with   runs of spaces\n\n\tand tabs",
    "emoji 🙂👩‍👩‍👧‍👦🏳️‍🌈 and CJK 你好，世界 こんにちは 한국어 ไทยภาษา",
    "naïve café — “quotes” … 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \u202e end",
    "def f(x):\n    return {'a': x ** 2}  # 12345\n",
)
PROPERTY = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def stream(tokenizer: Tokenizer, ids: Sequence[int], sizes: Sequence[int] = (1,), **options: object) -> list[str]:
    """What feed returns for `ids` in groups of `sizes` (used in turn), and finish's text last."""
    detokenizer = IncrementalDetokenizer(tokenizer, **options)  # type: ignore[arg-type]
    pieces, start, turn = [], 0, 0
    while start < len(ids):
        size = sizes[turn % len(sizes)]
        pieces.append(detokenizer.feed(ids[start : start + size]))
        start, turn = start + size, turn + 1
    pieces.append(detokenizer.finish())
    assert detokenizer.text == "".join(pieces)
    return pieces


@cache
def byte_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens that are one byte, of every value that exists."""
    singles = {}
    for token_id in range(tokenizer.vocab_size):
        data = tokenizer.token_bytes(token_id)
        if len(data) == 1:
            singles[data[0]] = token_id
    return [singles[byte] for byte in sorted(singles)]


@PROPERTY
@given(data=st.data())
def test_deltas_of_random_tokens_make_the_decoded_text(any_tokenizer: Tokenizer, data: st.DataObject) -> None:
    singles = byte_ids(any_tokenizer)
    token = st.integers(0, any_tokenizer.vocab_size + 3) | st.sampled_from(singles)
    text = st.sampled_from(SAMPLES).map(lambda sample: any_tokenizer.encode(sample, add_special_tokens=False))
    runs = st.lists(text | st.lists(token, max_size=12) | st.lists(st.sampled_from(singles), max_size=12), max_size=4)
    ids = [token_id for run in data.draw(runs) for token_id in run]
    skip = data.draw(st.booleans())
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    pieces = stream(any_tokenizer, ids, sizes, skip_special_tokens=skip)
    assert "".join(pieces) == any_tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("sample", SAMPLES)
def test_valid_text_never_shows_half_a_character(any_tokenizer: Tokenizer, sample: str) -> None:
    ids = any_tokenizer.encode(sample, add_special_tokens=False)
    pieces = stream(any_tokenizer, ids)
    assert "".join(pieces) == sample
    assert all(REPLACEMENT not in piece for piece in pieces)
    assert pieces[-1] == ""
    # Text is shown as soon as its token is there: nothing waits but the bytes of one character.
    shown = ""
    for count, piece in enumerate(pieces[:-1], start=1):
        shown += piece
        assert any_tokenizer.decode(ids[:count]).rstrip(REPLACEMENT) == shown


@PROPERTY
@given(data=st.data())
def test_byte_level_decode_equals_the_library(
    gguf_tokenizer: Tokenizer, folder_tokenizer: Tokenizer, data: st.DataObject
) -> None:
    tokenizer = data.draw(st.sampled_from([gguf_tokenizer, folder_tokenizer]))
    ids = data.draw(
        st.lists(st.integers(0, tokenizer.vocab_size - 1) | st.sampled_from(byte_ids(tokenizer)), max_size=40)
    )
    skip = data.draw(st.booleans())
    assert tokenizer.decode(ids, skip_special_tokens=skip) == tokenizer._backend.decode(ids, skip_special_tokens=skip)


@PROPERTY
@given(data=st.data())
def test_byte_fallback_decode_equals_the_library_where_bytes_are_characters(
    sentencepiece_tokenizer: Tokenizer, data: st.DataObject
) -> None:
    tokenizer = sentencepiece_tokenizer
    first_byte, first_text = 3, 259
    character = st.characters(exclude_categories=["Cs"]).map(lambda c: [first_byte + b for b in c.encode()])
    other = st.sampled_from([0, 1, 2, *range(first_text, tokenizer.vocab_size)]).map(lambda i: [i])
    ids = [i for run in data.draw(st.lists(character | other, max_size=30)) for i in run]
    skip = data.draw(st.booleans())
    assert tokenizer.decode(ids, skip_special_tokens=skip) == tokenizer._backend.decode(ids, skip_special_tokens=skip)


def test_broken_byte_tokens_spare_the_characters_beside_them(sentencepiece_tokenizer: Tokenizer) -> None:
    first_byte = 3
    ids = [first_byte + byte for byte in "é".encode() + b"\xff\xe4\xbd"]
    assert sentencepiece_tokenizer.decode(ids) == "é" + 3 * REPLACEMENT
    # The library replaces the whole run: with it, "é" could not be shown before the run has ended.
    assert sentencepiece_tokenizer._backend.decode(ids) == 5 * REPLACEMENT
    assert stream(sentencepiece_tokenizer, ids) == ["", "é", REPLACEMENT, "", "", 2 * REPLACEMENT]


class CountingTokenizer:
    """Counts how often tokens are looked at."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.special_token_ids = tokenizer.special_token_ids
        self.decoding_rule = tokenizer.decoding_rule
        self.num_looks = 0

    def token_bytes(self, token_id: int, *, is_first: bool = False) -> bytes:
        self.num_looks += 1
        return self._tokenizer.token_bytes(token_id, is_first=is_first)


def test_long_runs_of_broken_bytes_are_shown_at_once_and_looked_at_once(any_tokenizer: Tokenizer) -> None:
    broken = next(i for i in byte_ids(any_tokenizer) if any_tokenizer.token_bytes(i) == b"\x80")
    counting = CountingTokenizer(any_tokenizer)
    detokenizer = IncrementalDetokenizer(counting)  # type: ignore[arg-type]
    num_tokens = 20_000
    assert all(detokenizer.feed([broken]) == REPLACEMENT for _ in range(num_tokens))
    assert counting.num_looks == num_tokens
    assert detokenizer.finish() == ""


def test_a_long_prompt_is_hardly_looked_at(any_tokenizer: Tokenizer) -> None:
    prompt = any_tokenizer.encode("some words " * 2000)
    counting = CountingTokenizer(any_tokenizer)
    IncrementalDetokenizer(counting, prompt_token_ids=prompt)  # type: ignore[arg-type]
    assert counting.num_looks <= 10


# What the prompt decides


def test_the_space_at_the_start_of_a_text_is_dropped_only_there(sentencepiece_tokenizer: Tokenizer) -> None:
    bos, *ids = sentencepiece_tokenizer.encode("the cat")
    assert "".join(stream(sentencepiece_tokenizer, ids)) == "the cat"
    assert "".join(stream(sentencepiece_tokenizer, ids, prompt_token_ids=[bos])) == "the cat"
    assert "".join(stream(sentencepiece_tokenizer, ids, prompt_token_ids=[bos, *ids])) == " the cat"


def test_a_character_that_the_prompt_begins_belongs_to_the_output(any_tokenizer: Tokenizer) -> None:
    singles = {any_tokenizer.token_bytes(i): i for i in byte_ids(any_tokenizer)}
    ids = [singles[bytes([byte])] for byte in "🙂".encode()]
    for cut in range(1, 4):
        for before in ([], any_tokenizer.encode("words")):
            pieces = stream(any_tokenizer, ids[cut:], prompt_token_ids=[*before, *ids[:cut]])
            assert "".join(pieces) == "🙂"


@PROPERTY
@given(data=st.data())
def test_prompt_and_output_together_make_the_decoded_text(any_tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = any_tokenizer.encode(data.draw(st.sampled_from(SAMPLES)))
    cut = data.draw(st.integers(0, len(ids)))
    prompt_text = any_tokenizer.decode(ids[:cut]).rstrip(REPLACEMENT)
    output = "".join(stream(any_tokenizer, ids[cut:], prompt_token_ids=ids[:cut]))
    assert prompt_text + output == any_tokenizer.decode(ids)


# Stop strings


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """(end, stop) of the stop string that is complete first, the longest of those that end together."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


@settings(PROPERTY, max_examples=400)
@given(
    text=st.text(alphabet="abc", max_size=40),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=6), max_size=4),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
)
def test_the_matcher_follows_the_definition(text: str, stops: list[str], sizes: list[int]) -> None:
    matcher = StopMatcher(stops)
    start = turn = 0
    found = None
    while start < len(text) and found is None:
        piece = text[start : start + sizes[turn % len(sizes)]]
        match = matcher.push(piece)
        found = None if match is None else (start + match.end, match.stop)
        start, turn = start + len(piece), turn + 1
        if found is None:
            seen = text[:start]
            held = max((n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])), default=0)
            assert matcher.num_pending == held
    assert found == first_stop(text, stops)


@settings(PROPERTY, max_examples=200)
@given(data=st.data())
def test_stop_strings_are_cut_exactly_across_tokens(any_tokenizer: Tokenizer, data: st.DataObject) -> None:
    sample = data.draw(st.sampled_from(SAMPLES))
    start = data.draw(st.integers(0, len(sample) - 1))
    inside = sample[start : start + data.draw(st.integers(1, 9))]
    stops = [inside, *data.draw(st.lists(st.sampled_from([" ", "好", "🙂", "zz", "en", "ext, w"]), max_size=2))]
    include = data.draw(st.booleans())
    ids = any_tokenizer.encode(sample, add_special_tokens=False)
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    end, stop = first_stop(sample, stops) or (0, "")
    detokenizer = IncrementalDetokenizer(any_tokenizer, stop=stops, include_stop_str=include)
    shown, position, turn = "", 0, 0
    expected = sample[:end] if include else sample[: end - len(stop)]
    while position < len(ids):
        size = sizes[turn % len(sizes)]
        shown += detokenizer.feed(ids[position : position + size])
        assert expected.startswith(shown)  # nothing leaks
        position, turn = position + size, turn + 1
    shown += detokenizer.finish()
    assert shown == detokenizer.text == expected
    assert detokenizer.stop_reason == stop
    # num_tokens is the first count of tokens whose text holds the stop string.
    count = detokenizer.num_tokens
    assert stop in any_tokenizer.decode(ids[:count])
    assert first_stop(any_tokenizer.decode(ids[: count - 1]), stops) is None


def test_finish_releases_what_might_have_been_a_stop_string(folder_tokenizer: Tokenizer) -> None:
    ids = folder_tokenizer.encode("go on: STO", add_special_tokens=False)
    pieces = stream(folder_tokenizer, ids, stop=["STOP"])
    assert "".join(pieces) == "go on: STO"
    assert pieces[-1] == "STO"


def test_after_the_stop_string_or_finish_nothing_comes(folder_tokenizer: Tokenizer) -> None:
    ids = folder_tokenizer.encode("one two three", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(folder_tokenizer, stop=["two"])
    assert detokenizer.feed(ids) == "one "
    assert detokenizer.feed(ids) == "" == detokenizer.finish()
    finished = IncrementalDetokenizer(folder_tokenizer)
    finished.finish()
    assert finished.feed(ids) == "" == finished.finish() == finished.text


def test_stop_strings_wait_for_min_tokens(folder_tokenizer: Tokenizer) -> None:
    first = folder_tokenizer.encode("a stop, ", add_special_tokens=False)
    second = folder_tokenizer.encode("b stop, c", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(folder_tokenizer, stop=["stop"], min_tokens=len(first))
    assert detokenizer.feed(first) == "a stop, "
    assert detokenizer.feed(second) == "b "
    assert detokenizer.stop_reason == "stop"


def test_a_stop_string_can_be_a_special_tokens_text(folder_tokenizer: Tokenizer) -> None:
    ids = folder_tokenizer.encode("text<|im_end|>more", add_special_tokens=False)
    shown = stream(folder_tokenizer, ids, stop=["<|im_end|>"], skip_special_tokens=False)
    assert "".join(shown) == "text"
    assert "".join(stream(folder_tokenizer, ids, stop=["<|im_end|>"])) == "textmore"


# Rules of decoders


def wordlike_backend(decoder: decoders.Decoder) -> tokenizers.Tokenizer:
    words = ["▁a", "▁▁b", "▁", "c", "<0x41>", "<0xE4>", "<0xBD>", "<0xA0>", " d", "<0xZZ>", "e▁f", "é", "日本"]
    backend = tokenizers.Tokenizer(models.BPE(vocab={word: rank for rank, word in enumerate(words)}, merges=[]))
    backend.decoder = decoder
    return backend


FOLLOWED = [
    decoders.Metaspace(),
    decoders.Metaspace(prepend_scheme="never"),
    decoders.ByteLevel(),
    decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 3, 0)]),
    decoders.Sequence([decoders.Replace("c", "▁x"), decoders.Replace("▁", "-"), decoders.Fuse()]),
]


@pytest.mark.parametrize("decoder", FOLLOWED, ids=range(len(FOLLOWED)))
def test_rules_follow_the_librarys_decoders(decoder: decoders.Decoder) -> None:
    backend = wordlike_backend(decoder)
    tokenizer = Tokenizer(backend)
    rng = random.Random(0)
    character, whole = [5, 6, 7], [[i] for i in (0, 1, 2, 3, 4, 8, 9, 10, 11, 12)]
    for _ in range(300):
        ids = [i for run in rng.choices([*whole, character], k=rng.randint(0, 8)) for i in run]
        assert tokenizer.decode(ids) == backend.decode(ids) == "".join(stream(tokenizer, ids)), ids


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.CTC(),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "")]),
        decoders.Sequence([decoders.Replace(tokenizers.Regex("a+"), "")]),
        decoders.Sequence([decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.ByteLevel(), decoders.ByteFallback()]),
        decoders.Sequence([decoders.Replace("a", "b"), decoders.ByteLevel()]),
    ],
)
def test_decoders_that_cannot_be_followed_are_refused(decoder: decoders.Decoder | None) -> None:
    with pytest.raises(LoadError, match="expected ByteLevel, Metaspace, or a sequence"):
        decoding_rule(decoder)


def test_what_is_stripped_is_cut_off_at_once() -> None:
    """A copy for each of sixteen million characters would take an hour."""
    rule = DecodingRule(strip=(" ", 2**32))
    assert decode_bytes(rule, [b" " * 2**24, b"a b"]) == "a b"
    assert decode_bytes(DecodingRule(strip=(" ", 3)), [b"  ", b"  a"]) == " a"
    assert decode_bytes(DecodingRule(strip=(" ", 3)), [b" ", b"", b"a "]) == "a "
    assert decode_bytes(DecodingRule(strip=("\u00e9", 2)), ["\u00e9\u00e9\u00e9".encode()]) == "\u00e9"


def test_a_decoder_strips_few_characters() -> None:
    """As long as they are stripped, the prompt is looked at."""
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    assert decoding_rule(decoders.Sequence([*steps, decoders.Strip(" ", 64, 0)])).strip == (" ", 64)
    with pytest.raises(LoadError, match="Strip of 4294967295 characters"):
        decoding_rule(decoders.Sequence([*steps, decoders.Strip(" ", 2**32 - 1, 0)]))


def test_the_byte_alphabet_is_the_librarys() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    backend = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.decoder = decoders.ByteLevel()
    for byte in range(128):
        assert backend.decode([byte], skip_special_tokens=False) == chr(byte)
    assert backend.decode(list("é🙂".encode())) == "é🙂"


def test_token_text_and_bytes(gguf_tokenizer: Tokenizer, sentencepiece_tokenizer: Tokenizer) -> None:
    smiley = gguf_tokenizer.encode("🙂")
    assert b"".join(map(gguf_tokenizer.token_bytes, smiley)) == "🙂".encode()
    assert gguf_tokenizer.token_text(smiley[0]) == REPLACEMENT
    assert gguf_tokenizer.token_text(gguf_tokenizer.encode(" the")[0]) == " the"
    assert gguf_tokenizer.token_text(2) == "<|im_end|>"
    assert gguf_tokenizer.token_bytes(10**9) == gguf_tokenizer.token_bytes(-1) == b""
    assert sentencepiece_tokenizer.token_bytes(3 + 0xE4) == b"\xe4"
    assert sentencepiece_tokenizer.token_text(3 + 0x41) == "A"
    the = sentencepiece_tokenizer.encode("the", add_special_tokens=False)[0]
    assert sentencepiece_tokenizer.token_bytes(the).startswith(b" t")
