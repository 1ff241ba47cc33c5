"""Tokenizers made of GGUF metadata: ids against transformers and against the algorithms, and what is refused."""
# ruff: noqa: RUF001  (scripts of the world)

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
import tokenizers
from transformers import AutoTokenizer

from converters.gguf_tokenizer import PRE_TOKENIZERS
from qengine.errors import LoadError
from qengine.tokenizer import Tokenizer, gguf, tokenizer_from_gguf
from qengine.tokenizer.token_bytes import byte_alphabet
from tests.tokenizer.sentencepiece_model import CORPUS, reference_ids, sentencepiece_metadata

TEXTS = (
    "Hello world! It's a fine day, isn't it? THE END'S NEAR",
    "def f(x: int) -> str:\n    return f'{x!r}'\n\n\n# done\t\ttabs",
    "你好，世界。こんにちは 한국어 ไทย العربية हिन्दी",
    "emoji 🙂🎉👩‍👩‍👧 done 🏳️‍🌈",
    "  leading,   runs \n \n\n of   whitespace\r\n\u00a0\u3000 end  ",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><file_sep>x < | im_end | >",
    "naïve café — “quotes” … x=3.14159e-10; 2024/12/31 ½ ² ④ Ⅷ",
    "",
)
SPELLED = {byte: character for character, byte in byte_alphabet().items()}


def byte_level_metadata(**changes: Any) -> dict[str, Any]:
    """A small byte-level vocabulary: all bytes, a few merges, one control and one user-defined token."""
    merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "Ġ Ġ", "1 2", "12 3", "ä ½", "' s"]
    bytes_ = [SPELLED[byte] for byte in range(256)]
    tokens = [*bytes_, *(merge.replace(" ", "") for merge in merges), "<|bos|>", "<|eos|>", "<think>"]
    values: dict[str, Any] = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [*[1] * (len(tokens) - 3), 3, 3, 4],
        "merges": merges,
        "bos_token_id": len(tokens) - 3,
        "eos_token_id": len(tokens) - 2,
        **changes,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in values.items() if value is not None}


# The bundled model


def bpe(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding by its definition: always merge the pair that was learned first, at its first place."""
    parts = list(word)
    while True:
        pairs = [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not pairs:
            return parts
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def reference_smollm_ids(text: str, metadata: dict[str, Any]) -> list[int]:
    """Ids by definition: special tokens whole, each digit alone, then GPT-2's words, then byte-pair encoding."""
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])}
    special = {t for t, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True) if kind == 3}
    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    result = []
    for piece in regex.split("(" + "|".join(map(regex.escape, special)) + ")", text):
        if piece in special:
            result.append(ids[piece])
            continue
        for run in regex.findall(r"\p{N}|\P{N}+", piece):
            for word in regex.findall(words, run):
                spelled = "".join(SPELLED[byte] for byte in word.encode())
                result.extend(ids[part] for part in bpe(spelled, ranks) if part in ids)
    return result


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_bundled_model_gives_the_ids_of_the_definition(
    gguf_tokenizer: Tokenizer, gguf_metadata: dict[str, Any], text: str
) -> None:
    assert gguf_tokenizer.encode(text) == reference_smollm_ids(text, gguf_metadata)


@pytest.fixture(scope="module")
def oracle(gguf_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(gguf_path.parent), gguf_file=gguf_path.name)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_bundled_model_gives_the_ids_and_text_of_transformers(
    gguf_tokenizer: Tokenizer, oracle: Any, text: str
) -> None:
    # transformers does not know the pre-tokenizer "smollm" and cuts as GPT-2 does, which shows at spaces before digits.
    text = regex.sub(r"\s+(?=\p{N})", "", text)
    ids = gguf_tokenizer.encode(text)
    assert ids == oracle(text)["input_ids"]
    for skip in (True, False):
        assert gguf_tokenizer.decode(ids, skip_special_tokens=skip) == oracle.decode(ids, skip_special_tokens=skip)


def test_bundled_model_says_what_transformers_says(gguf_tokenizer: Tokenizer, oracle: Any) -> None:
    assert gguf_tokenizer.vocab_size == len(oracle) == 49152
    assert gguf_tokenizer.bos_token_id == oracle.bos_token_id == 1
    assert oracle.eos_token_id in gguf_tokenizer.eos_token_ids
    assert gguf_tokenizer.eos_token_ids == {0, 2}  # <|im_end|> and, as llama.cpp holds, <|endoftext|>
    assert gguf_tokenizer.special_token_ids == set(range(17))
    assert gguf_tokenizer.chat_template == oracle.chat_template


# Cutting into words


CUTS = [
    ("gpt-2", "it's 12345  ok\n\n x_y", ["it", "'s", " 12345", " ", " ok", "\n\n", " x", "_", "y"]),
    ("smollm", "a 12  34", ["a", " ", "1", "2", "  ", "3", "4"]),
    ("starcoder", "x=10", ["x", "=", "1", "0"]),
    ("llama-bpe", "IT'S 12345\n\n (x)  y", ["IT", "'S", " ", "123", "45", "\n\n", " (", "x", ")", " ", " y"]),
    ("llama3", "!word\r\n\t z", ["!word", "\r\n", "\t", " z"]),
    ("qwen2", "IT'LL 123 ...\n ok", ["IT", "'LL", " ", "1", "2", "3", " ...\n", " ok"]),
    ("deepseek-r1-qwen", "π2²", ["π", "2", "²"]),
    ("qwen35", "हिन्दी x", ["हिन्दी", " x"]),
    ("tekken", "camelCase HTTPServer's 12/\n", ["camel", "Case", " HTTPServer", "'s", " ", "1", "2", "/\n"]),
    ("gpt-4o", "camelCase don't 1234", ["camel", "Case", " don't", " ", "123", "4"]),
    ("falcon", "a, b 123456", ["a", ",", " b", " ", "123", "456"]),
    ("default", "a+b 1234", ["a", "+", "b", " ", "123", "4"]),
    ("command-r", "7 up", ["7", " up"]),
    ("refact", "  x", [" ", " x"]),
    ("deepseek-coder", "x = 12;\n你好", ["x", " = ", "1", "2", ";", "\n", "你好"]),
    ("deepseek-v3", "f(x)=1234 你好ok\n", ["f", "(x", ")=", "123", "4", " ", "你好", "ok", "\n"]),
    ("seed-coder", "a 1 !!\n\nb", ["a", " ", "1", " !!", "\n\n", "b"]),
]


@pytest.mark.parametrize(("name", "text", "words"), CUTS, ids=[cut[0] for cut in CUTS])
def test_text_is_cut_into_words_by_name(name: str, text: str, words: list[str]) -> None:
    cut = PRE_TOKENIZERS[name].build().pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in cut] == words


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_no_cut_loses_a_byte(name: str) -> None:
    tokenizer = tokenizer_from_gguf(byte_level_metadata(pre=name, add_bos_token=False))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


# Byte-level: options


def test_merges_whole_tokens_and_ends() -> None:
    tokenizer = tokenizer_from_gguf(byte_level_metadata(add_bos_token=True, add_eos_token=True))
    tokens = byte_level_metadata()["tokenizer.ggml.tokens"]
    expected = ["<|bos|>", "hello", "Ġhello", "<think>", "<|eos|>", "x", "<|eos|>"]
    assert [tokens[i] for i in tokenizer.encode("hello hello<think><|eos|>x")] == expected
    assert [tokens[i] for i in tokenizer.encode("hello", add_special_tokens=False)] == ["hello"]
    ids = tokenizer.encode("a<think>b<|eos|>", add_special_tokens=False)
    assert tokenizer.decode(ids) == "a<think>b"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<think>b<|eos|>"
    assert len(tokenizer.special_token_ids) == 2


@pytest.mark.parametrize(("pre", "given", "adds"), [("gpt-2", None, 0), ("llama-bpe", None, 1), ("tekken", False, 0)])
def test_bos_is_added_as_the_file_or_else_the_pre_tokenizer_says(pre: str, given: bool | None, adds: int) -> None:
    tokenizer = tokenizer_from_gguf(byte_level_metadata(pre=pre, add_bos_token=given))
    assert tokenizer.encode("x")[:-1] == [tokenizer.bos_token_id] * adds


def test_a_word_that_is_a_token_stays_whole_where_merges_are_ignored() -> None:
    # "xyz" is a token that no merge makes.
    metadata = byte_level_metadata()
    for name, value in (("tokens", "xyz"), ("token_type", 1)):
        metadata[f"tokenizer.ggml.{name}"] = [*metadata[f"tokenizer.ggml.{name}"], value]
    lengths = {}
    for pre in ("gpt-2", "llama-bpe"):
        metadata["tokenizer.ggml.pre"] = pre
        lengths[pre] = len(tokenizer_from_gguf(metadata).encode("xyz", add_special_tokens=False))
    assert lengths == {"gpt-2": 3, "llama-bpe": 1}


@pytest.mark.parametrize("kind", [2, 3, 4])
def test_tokens_that_are_matched_whole_are_few(monkeypatch: pytest.MonkeyPatch, kind: int) -> None:
    """They are counted before the library prepares the search for them."""
    metadata = byte_level_metadata()

    def extended(num_tokens: int, kind: int) -> dict[str, Any]:
        more = {"tokens": [f"{i:04}" * 256 for i in range(num_tokens)], "token_type": [kind] * num_tokens}
        return metadata | {f"tokenizer.ggml.{n}": [*metadata[f"tokenizer.ggml.{n}"], *v] for n, v in more.items()}

    assert tokenizer_from_gguf(extended(100, kind)).encode("0099" * 256, add_special_tokens=False)
    assert tokenizer_from_gguf(extended(1025, 1)).encode("x")
    monkeypatch.setattr(gguf, "read_tokenizer", None)
    with pytest.raises(LoadError, match=r"token_type: the added tokens take 10\d{5} bytes"):
        tokenizer_from_gguf(extended(1025, kind))


def test_equal_and_empty_tokens_keep_their_ids() -> None:
    metadata = byte_level_metadata()
    first = metadata["tokenizer.ggml.tokens"].index("hello")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "hello", "", ""]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1, 1, 3]
    tokenizer = tokenizer_from_gguf(metadata)
    count = len(metadata["tokenizer.ggml.tokens"])
    assert tokenizer.vocab_size == count
    assert tokenizer.encode("hello") == [first]
    assert tokenizer.decode([first, count - 3, count - 2, count - 1]) == "hellohello"


def test_missing_pre_and_token_types_are_the_defaults() -> None:
    tokenizer = tokenizer_from_gguf(byte_level_metadata(pre=None, token_type=None))
    assert tokenizer.special_token_ids == {tokenizer.bos_token_id, *tokenizer.eos_token_ids}
    assert tokenizer.decode(tokenizer.encode("a+b 1234")) == "a+b 1234"


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["<|eot_id|>", "<|eom_id|>"], {"<|eot_id|>", "<|eom_id|>"}),
        (["<|end|>"], {"<|end|>"}),
        (["<|end|>", "<|return|>"], set()),
        (["<|other|>"], set()),
    ],
)
def test_end_of_turn_tokens_are_known_by_name(texts: list[str], expected: set[str]) -> None:
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.tokens"] = tokens = [*metadata["tokenizer.ggml.tokens"], *texts]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], *[3] * len(texts)]
    metadata["tokenizer.ggml.eot_token_id"] = 5
    eos = tokenizer_from_gguf(metadata).eos_token_ids
    assert {tokens[i] for i in eos} == {"<|eos|>", tokens[5], *expected}


def test_chat_templates_of_the_metadata() -> None:
    metadata = {
        **byte_level_metadata(),
        "tokenizer.chat_template": "{{ bos_token }}plain",
        "tokenizer.chat_templates": ["tool_use", "gone"],
        "tokenizer.chat_template.tool_use": "with tools",
    }
    tokenizer = tokenizer_from_gguf(metadata)
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.render_chat(messages) == "<|bos|>plain"
    assert tokenizer.render_chat(messages, tools=[{"type": "function"}]) == "with tools"


# SentencePiece


def test_sentencepiece_ids_are_those_of_the_definition() -> None:
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata())
    words = [*CORPUS.split(), "yellow", "世", "🙂", "  ", "\n", "zzz", "the"]
    rng = random.Random(1)
    texts = ["", " ", "  the cat", *(" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(200))]
    for text in texts:
        assert tokenizer.encode(text, add_special_tokens=False) == reference_ids(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_ids_are_those_of_transformers() -> None:
    metadata = sentencepiece_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    tokenizer = tokenizer_from_gguf(metadata)
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    vocab = {token: i for i, token in enumerate(tokens)}
    transformers_merges = pytest.importorskip("transformers.tokenization_utils_base").generate_merges(vocab, scores)
    oracle = pytest.importorskip("transformers").LlamaTokenizer(vocab=vocab, merges=transformers_merges)
    for text in (CORPUS, "thethe rather, THE 🙂 ünïcode", "x = [1, 2]"):
        assert tokenizer.encode(text, add_special_tokens=False) == oracle(text, add_special_tokens=False)["input_ids"]


def test_sentencepiece_ends_whole_tokens_and_spaces() -> None:
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata(bos_token_id=None, eos_token_id=None, unknown_token_id=None))
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_ids == {2}
    assert tokenizer.encode("the")[0] == 1
    assert tokenizer.encode("</s>", add_special_tokens=False) == [2]
    assert tokenizer.encode("<tool>", add_special_tokens=False) == [tokenizer.vocab_size - 1]
    assert tokenizer.decode([tokenizer.vocab_size - 1, 2]) == "<tool>"
    plain = tokenizer_from_gguf(sentencepiece_metadata(add_space_prefix=False, add_bos_token=False))
    assert plain.encode(" the") == tokenizer.encode("the")[1:]
    assert plain.decode(plain.encode(" the")) == " the"


# Refusals


COUNT = len(byte_level_metadata()["tokenizer.ggml.tokens"])
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "ggml.model is None, expected a value of type str"),
    ({"model": "bert"}, "ggml.model is 'bert', expected 'gpt2' or 'llama'"),
    ({"model": 3}, "ggml.model is 3"),
    ({"pre": "martian"}, "ggml.pre is 'martian', expected one of .*llama-bpe.*qwen2"),
    ({"pre": 7}, "ggml.pre is 7, expected a value of type str"),
    ({"tokens": None}, "ggml.tokens is None, expected a list of str"),
    ({"tokens": []}, "ggml.tokens is 'a list of 0', expected 1 to 1048576 tokens"),
    ({"tokens": ["a", 1]}, "ggml.tokens is 'a list with int', expected a list of str"),
    ({"tokens": "abc"}, "ggml.tokens is 'abc'"),
    ({"tokens": [f"t\ud800{i}" for i in range(COUNT)], "merges": []}, "tokenizer is unusable"),
    ({"token_type": [1]}, f"ggml.token_type is 'a list of 1', expected one entry for each of the {COUNT} tokens"),
    ({"token_type": ["1"] * COUNT}, "ggml.token_type is 'a list with str'"),
    ({"merges": None}, "ggml.merges is None"),
    ({"merges": ["h e", 3]}, "ggml.merges is 'a list with int'"),
    ({"merges": ["he"]}, "ggml.merges is 'he', expected two tokens"),
    ({"merges": [" "]}, "ggml.merges is ' '"),
    ({"merges": ["h nothere"]}, "ggml.merges is 'h nothere'"),
    ({"merges": ["hel lo"]}, "unusable.*out of vocabulary|ggml.merges"),
    ({"bos_token_id": COUNT}, f"ggml.bos_token_id is {COUNT}, expected an id below {COUNT}"),
    ({"eos_token_id": -1}, "ggml.eos_token_id is -1"),
    ({"eot_token_id": 2**40}, "ggml.eot_token_id"),
    ({"padding_token_id": "0"}, "ggml.padding_token_id is '0', expected a value of type int"),
    ({"unknown_token_id": True}, "ggml.unknown_token_id is True"),
    ({"add_bos_token": "yes"}, "ggml.add_bos_token is 'yes', expected a value of type bool"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_byte_level_metadata_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        tokenizer_from_gguf(byte_level_metadata(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "ggml.scores is None, expected a list of float or int"),
        ({"scores": [0.0]}, "ggml.scores is 'a list of 1'"),
        ({"scores": ["x"]}, "ggml.scores is 'a list with str'"),
        ({"scores": [float("nan")] * len(sentencepiece_metadata()["tokenizer.ggml.tokens"])}, "NaN"),
        ({"add_space_prefix": 1}, "ggml.add_space_prefix is 1, expected a value of type bool"),
    ],
)
def test_sentencepiece_metadata_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        tokenizer_from_gguf(sentencepiece_metadata(**changes))


@pytest.mark.parametrize("template", [5, [1], [{"name": "default"}], [{"name": 1, "template": "x"}]])
def test_a_chat_template_of_the_wrong_kind_is_refused(template: Any) -> None:
    with pytest.raises(LoadError, match="chat_template in the GGUF metadata"):
        tokenizer_from_gguf({**byte_level_metadata(), "tokenizer.chat_template": template})


def test_random_damage_is_a_load_error_or_a_tokenizer() -> None:
    rng = random.Random(3)
    junk: list[Any] = [
        None,
        "",
        "x",
        -1,
        2**63,
        1.5,
        float("inf"),
        True,
        [],
        [None],
        ["a"],
        [2**40],
        {},
        b"x",
        "\ud800",
    ]
    for source in (byte_level_metadata(), sentencepiece_metadata()):
        for _ in range(150):
            metadata = dict(source)
            for key in rng.sample(sorted(metadata), k=rng.randint(1, 2)):
                value = metadata[key]
                if isinstance(value, list) and rng.random() < 0.7:
                    value = list(value)
                    value[rng.randrange(len(value))] = rng.choice(junk)
                else:
                    value = rng.choice(junk)
                metadata[key] = value
            try:
                tokenizer = tokenizer_from_gguf(metadata)
            except LoadError:
                continue
            assert isinstance(tokenizer.encode("some text"), list)
            assert isinstance(tokenizer._backend, tokenizers.Tokenizer)
