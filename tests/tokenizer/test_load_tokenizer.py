"""Tokenizers of model folders: ids equal to transformers', the files' precedence, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qengine.errors import ConfigError, LoadError, RequestError
from qengine.tokenizer import Tokenizer, load_tokenizer
from qengine.tokenizer.rust_errors import library_errors
from tests.tokenizer.conftest import FIXTURES
from tests.tokenizer.test_gguf_tokenizer import TEXTS

FOLDERS = sorted(path.parent.name for path in FIXTURES.glob("*/tokenizer.json"))
Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Makes a folder with a fixture's tokenizer.json and the given other files."""

    def make(files: Mapping[str, Any] | None = None, *, edit: Callable[[dict[str, Any]], object] | None = None) -> Path:
        tokenizer = json.loads((FIXTURES / "llama-gptq-sym-g128" / "tokenizer.json").read_text())
        if edit is not None:
            edit(tokenizer)
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
        for name, content in (files or {}).items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return make


@pytest.mark.parametrize("name", FOLDERS)
def test_fixture_folders_give_the_ids_and_text_of_transformers(name: str) -> None:
    path = str(FIXTURES / name)
    tokenizer, oracle = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == oracle(text)["input_ids"]
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == oracle.decode(ids, skip_special_tokens=skip)
    assert tokenizer.vocab_size == len(oracle)
    assert tokenizer.bos_token_id == oracle.bos_token_id
    assert tokenizer.eos_token_ids == {oracle.eos_token_id}
    assert tokenizer.special_token_ids == {i for i, token in oracle.added_tokens_decoder.items() if token.special}
    assert tokenizer.chat_template == oracle.chat_template


@pytest.mark.parametrize("name", FOLDERS)
def test_fixture_prompts_have_the_recorded_ids(name: str) -> None:
    tokenizer = load_tokenizer(str(FIXTURES / name))
    expected = json.loads((FIXTURES / name / "expected.json").read_text())
    prompts = expected["prompts"] if isinstance(expected, dict) else expected
    assert prompts
    for entry in prompts:
        assert tokenizer.encode(entry["prompt"]) == entry["prompt_token_ids"]


CONFIGURATIONS: list[dict[str, Any]] = [
    {},
    {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": True},
    {"bos_token": "<|im_start|>", "add_bos_token": False},
    {"eos_token": {"__type": "AddedToken", "content": "<|end|>", "lstrip": True, "normalized": False}},
    {"eos_token": "the", "additional_special_tokens": ["<extra>", "<more>"]},
    {"extra_special_tokens": [{"__type": "AddedToken", "content": "<more>", "rstrip": True, "special": True}]},
    {"extra_special_tokens": {"image_token": "<image>"}, "audio_token": "<audio>", "pad_token": None},
    {
        "added_tokens_decoder": {
            "2": {"content": "<|im_end|>", "rstrip": True, "special": True},
            "2049": {"content": "<b>", "special": False, "normalized": False},
            "2048": {"content": "<a>", "special": True},
        },
        "eos_token": "<|im_end|>",
    },
]


@pytest.mark.parametrize("config", CONFIGURATIONS, ids=range(len(CONFIGURATIONS)))
def test_configurations_mean_what_they_mean_to_transformers(folder: Folder, config: dict[str, Any]) -> None:
    path = str(folder({"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **config}}))
    tokenizer, oracle = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    text = "x <extra> y <more> z the<image><audio> <a> w <b> v  <|im_end|>  <|end|>"
    ids = tokenizer.encode(text)
    assert ids == oracle(text)["input_ids"]
    assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    assert tokenizer.bos_token_id == oracle.bos_token_id
    assert tokenizer.eos_token_ids == {oracle.eos_token_id} - {None}
    assert tokenizer.vocab_size == len(oracle)


def test_the_ends_of_a_text_are_those_of_tokenizer_json(folder: Folder) -> None:
    def edit(tokenizer: dict[str, Any]) -> None:
        bos = {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
        single = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        tokenizer["post_processor"].update(single=single, special_tokens={"<|im_start|>": bos})

    config = {"bos_token": "<|im_start|>", "add_bos_token": False, "add_eos_token": True, "eos_token": "<|im_end|>"}
    path = str(folder({"tokenizer_config.json": config}, edit=edit))
    ids = load_tokenizer(path).encode("a b")
    assert ids == AutoTokenizer.from_pretrained(path)("a b")["input_ids"]
    assert ids[0] == 1
    assert load_tokenizer(path).encode("a b", add_special_tokens=False) == ids[1:]


def test_special_tokens_map_counts_where_the_configuration_lists_no_added_tokens(folder: Folder) -> None:
    files = {"tokenizer_config.json": {"eos_token": "a"}, "special_tokens_map.json": {"eos_token": "<|im_end|>"}}
    assert load_tokenizer(str(folder(files))).eos_token_ids == {2}
    files["tokenizer_config.json"]["added_tokens_decoder"] = {}  # type: ignore[assignment]
    assert 2 not in load_tokenizer(str(folder(files))).eos_token_ids


def test_truncation_and_padding_of_the_file_are_off(folder: Folder) -> None:
    def edit(tokenizer: dict[str, Any]) -> None:
        tokenizer["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        ids = {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
        tokenizer["padding"] = {"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, **ids}

    tokenizer = load_tokenizer(str(folder(edit=edit)))
    text = "a b c d e f g h"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template_files_go_before_the_configuration(folder: Folder) -> None:
    messages = [{"role": "user", "content": "x"}]
    config = {"tokenizer_config.json": {"chat_template": "configured"}}
    assert load_tokenizer(str(folder(config))).render_chat(messages) == "configured"
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    both = load_tokenizer(str(folder({"tokenizer_config.json": {"chat_template": named}})))
    assert both.chat_template == "one"
    assert both.render_chat(messages) == "one"
    assert both.render_chat(messages, tools=[]) == "one"
    assert both.render_chat(messages, tools=[{"type": "function"}]) == "two"
    path = folder({**config, "chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "more"})
    files = load_tokenizer(str(path))
    assert files.render_chat(messages) == "file"
    assert files.render_chat(messages, tools=[{"type": "function"}]) == "more"


def test_a_missing_default_template_is_said(folder: Folder) -> None:
    named = [{"name": "rag", "template": "one"}]
    tokenizer = load_tokenizer(str(folder({"tokenizer_config.json": {"chat_template": named}})))
    with pytest.raises(
        RequestError, match=r"chat templates \['rag'\] but no 'default' one: start with --chat-template"
    ):
        tokenizer.render_chat([{"role": "user", "content": "x"}])


# A folder that transformers converts


def test_a_folder_without_tokenizer_json_is_converted(tmp_path: Path) -> None:
    source = json.loads((FIXTURES / "llama-gptq-sym-g128" / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(source["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in source["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path))
    reference = load_tokenizer(str(FIXTURES / "llama-gptq-sym-g128"))
    for text in TEXTS[:5]:
        assert tokenizer.encode(text) == reference.encode(text)
    assert tokenizer.eos_token_ids == {2}


def test_code_in_a_folder_is_never_run(folder: Folder, tmp_path: Path) -> None:
    sentinel = tmp_path / "was_run"
    evil = f"open({str(sentinel)!r}, 'w').close()\nclass EvilTokenizer: pass\n"
    config = {"auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}, "tokenizer_class": "EvilTokenizer"}
    path = folder({"tokenizer_config.json": config, "evil.py": evil})
    assert load_tokenizer(str(path)).encode("x")
    (path / "tokenizer.json").rename(path / "tokenizer.model")
    with pytest.raises(LoadError, match="transformers cannot make one"):
        load_tokenizer(str(path))
    assert not sentinel.exists()
    assert not [name for name in sys.modules if name.endswith("evil")]


# Refusals


STRETCHING = {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 64}
LONG_TOKENS = [{"content": f"{i:05}" + "a" * 9000, "normalized": True} for i in range(4)]


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": {str(5000 + i): token for i, token in enumerate(LONG_TOKENS)}},
        {"extra_special_tokens": LONG_TOKENS},
        {f"t{i}_token": token for i, token in enumerate(LONG_TOKENS)},
        {"added_tokens_decoder": {"5000": LONG_TOKENS[0]}, "extra_special_tokens": LONG_TOKENS[1:2]},
    ],
    ids=range(4),
)
def test_tokens_that_a_configuration_adds_count_with_the_normalizer(folder: Folder, config: dict[str, Any]) -> None:
    """Nothing is added before it is counted."""

    def edit(tokenizer: dict[str, Any]) -> None:
        tokenizer["normalizer"] = STRETCHING

    files = {"tokenizer_config.json": config}
    assert load_tokenizer(str(folder(files))).encode("a")
    with pytest.raises(LoadError, match=r"tokenizer_config\.json: the added tokens take"):
        load_tokenizer(str(folder(files, edit=edit)))


def test_many_short_tokens_of_a_configuration_pass(folder: Folder) -> None:
    def edit(tokenizer: dict[str, Any]) -> None:
        tokenizer["normalizer"] = {"type": "NFC"}

    words = [f"<|unused_{i:05}|>" for i in range(6400)]
    declared = {str(2048 + i): {"content": word, "normalized": True, "special": True} for i, word in enumerate(words)}
    tokenizer = load_tokenizer(str(folder({"tokenizer_config.json": {"added_tokens_decoder": declared}}, edit=edit)))
    assert tokenizer.encode(words[-1], add_special_tokens=False) == [2048 + 6399]


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"has no tokenizer: expected tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(LoadError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path / "absent"))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"version": "1.0"}', '{"model": {"type": "BPE"}}', "\x00"])
def test_a_broken_tokenizer_json_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(LoadError, match=r"tokenizer\.json is not a readable tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_shortened_tokenizer_json_is_refused(tmp_path: Path) -> None:
    source = FIXTURES / "llama-gptq-sym-g128" / "tokenizer.json"
    shutil.copy(source, tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(source.read_bytes()[:-100])
    with pytest.raises(LoadError, match="not a readable tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not readable JSON"),
        ("[" * 100_000, "is not readable JSON"),
        ("\x80", "is not readable JSON"),
        ([], "holds a JSON list, expected an object"),
        ({"eos_token": 5}, "eos_token of tokenizer_config.json is 5, expected a token's text"),
        ({"eos_token": {"text": "x"}}, "eos_token of tokenizer_config.json"),
        ({"eos_token": {"content": ""}}, "eos_token of tokenizer_config.json"),
        ({"eos_token": "\ud800"}, "eos_token of tokenizer_config.json|cannot be added"),
        ({"extra_special_tokens": "x"}, "extra_special_tokens is a str"),
        ({"extra_special_tokens": [5]}, "a special token"),
        ({"added_tokens_decoder": []}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"x": "y"}}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"5": 5}}, r"added_tokens_decoder\[5\]"),
        ({"chat_template": 5}, "chat_template in .* is a int"),
    ],
)
def test_a_broken_configuration_is_refused(folder: Folder, config: Any, message: str) -> None:
    if config == "\x80":
        path = folder()
        (path / "tokenizer_config.json").write_bytes(b'{"a": "\x80"}')
    else:
        path = folder({"tokenizer_config.json": config})
    with pytest.raises(LoadError, match=message):
        load_tokenizer(str(path))


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", None, 5, b"x"])
def test_what_is_not_unicode_text_is_refused(folder_tokenizer: Tokenizer, text: Any) -> None:
    with pytest.raises(RequestError, match="expected") as caught:
        folder_tokenizer.encode(text)
    assert caught.value.param == "prompt"


class PanicException(BaseException):
    """Named and derived as the one of the library's Rust side."""


def test_a_panic_of_the_library_is_an_error_and_an_interrupt_is_not() -> None:
    with pytest.raises(LoadError, match="it broke"), library_errors(LoadError):
        raise PanicException("it broke")
    with pytest.raises(KeyboardInterrupt), library_errors(LoadError):
        raise KeyboardInterrupt
    with pytest.raises(ConfigError), library_errors(LoadError):
        raise ConfigError("ours already")
