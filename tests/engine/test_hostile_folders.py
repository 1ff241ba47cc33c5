"""A model folder made to harm: it cannot run code, hang, or take memory; it is refused, or read without what is evil.

Each case is a fixture's folder with one file replaced, opened as an engine does, in a process that may take 512 MiB
more than it has after its imports, and that would show whether anything was run.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.engine.fixtures import path

FIXTURE = Path(path("llama-gptq-sym-g128"))
PROGRAM = """
import json, resource, sys, time
from pathlib import Path
from qengine.config import EngineConfig
from qengine.errors import QEngineError
from qengine.runtime.loader import open_model
from qengine.startup import model_tokenizer

def size(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

resource.setrlimit(resource.RLIMIT_AS, (size("VmSize") + 2**29, resource.RLIM_INFINITY))
for folder in json.loads(sys.stdin.read()):
    Path("/proc/self/clear_refs").write_text("5")  # The peak, "VmHWM", begins anew.
    started, before = time.process_time(), size("VmRSS")
    try:
        config = EngineConfig.from_options({"model": folder, "device": "cpu"})
        tokenizer = model_tokenizer(config, open_model(config.load))
        tokenizer.encode("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!" * 3)
        if tokenizer.chat_template is not None:
            said = tokenizer.render_chat([{"role": "user", "content": "Hi"}])
            assert "class" not in said, said
        outcome = "read"
    except QEngineError as error:
        outcome = str(error)
    grew = size("VmHWM") - before
    own = [name for name in sys.modules if "evil" in name or "transformers_modules" in name]
    print(json.dumps([folder, time.process_time() - started, grew, outcome, own]), flush=True)
"""
EVIL_CODE = "open(__file__ + '.was_run', 'w').close()\nclass EvilModel: pass\nclass EvilTokenizer: pass\n"
AUTO_MAP = {
    "AutoConfig": "evil.EvilModel",
    "AutoModelForCausalLM": "evil.EvilModel",
    "AutoTokenizer": "evil.EvilTokenizer",
}


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def _tokenizer(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "tokenizer.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def _write(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def _huge(name: str) -> Callable[[Path], None]:
    """A file of a terabyte without a byte on the disk."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        with (folder / name).open("wb") as file:
            file.truncate(2**40)

    return change


def _pipe(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def _template(text: str) -> Callable[[Path], None]:
    return _write("chat_template.jinja", text)


def _with_code(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def both(folder: Path) -> None:
        (folder / "evil.py").write_text(EVIL_CODE)
        change(folder)

    return both


def _regex(pattern: str) -> Callable[[Path], None]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return _tokenizer(pre_tokenizer=split)


def _rewritten(old: str, new: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        _tokenizer(**changes)(folder)
        file = folder / "tokenizer.json"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    return change


def _link(name: str, target: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def _inside(name: str, change: Callable[[Path], None]) -> Callable[[Path], None]:
    def made(folder: Path) -> None:
        (folder / name).mkdir()
        change(folder / name)

    return made


def _many_templates(folder: Path) -> None:
    for number in range(1000):
        (folder / f"{number}.jinja").write_text("x")


def _without_json(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def both(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        change(folder)

    return both


def _around(ids: list[int], times: int) -> dict[str, Any]:
    """A post-processor that puts `ids` before a text, which it writes so many times."""
    text = [{"Sequence": {"id": "A", "type_id": 0}}] * times
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, *text],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"x": {"id": "x", "ids": ids, "tokens": ["a"] * len(ids)}},
    }


TENFOLD = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
TENFOLDS = {"type": "Sequence", "normalizers": [TENFOLD] * 12}
TWOFOLD = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
#: A token that the library normalizes while it reads it.
NORMALIZED = {
    "id": 0, "content": "aaa!", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True,
    "special": False,
}  # fmt: skip
#: A trie of one unit, and a text of 100 kB that it could point to.
LONG_MAP = {
    "type": "Precompiled",
    "precompiled_charsmap": base64.b64encode((4).to_bytes(4, "little") + bytes(4) + b"z" * 100_000 + b"\0").decode(),
}
DEEP = "[" * 200_000


def _many_rules(folder: Path) -> None:
    """Each of its patterns is allowed; together they would take a quarter of an hour."""
    config = json.loads((folder / "config.json").read_text())
    patterns: dict[str, Any] = {f"-:.*.*.*.*.*.*!{n}": {} for n in range(4096)}
    config["quantization_config"]["dynamic"] = patterns
    (folder / "config.json").write_text(json.dumps(config))


def _digits(name: str) -> Callable[[Path], None]:
    return _write(name, '{"a": ' + "9" * 2_000_000 + "}")


#: name -> (what is changed, what the refusal says; "read" where the evil is ignored).
CASES: Mapping[str, tuple[Callable[[Path], None], str]] = {
    "nothing": (lambda folder: None, "read"),
    # Code
    "auto_map beside a known architecture": (_with_code(_config(auto_map=AUTO_MAP)), "read"),
    "auto_map with an unknown architecture": (
        _with_code(_config(auto_map=AUTO_MAP, architectures=["EvilModel"], model_type="evil")),
        "EvilModel",
    ),
    "a tokenizer of its own": (
        _with_code(_write("tokenizer_config.json", json.dumps({"auto_map": AUTO_MAP, "tokenizer_class": "Evil"}))),
        "read",
    ),
    "weights in a pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin") and None,
        "safetensors",
    ),
    "a template that looks for os": (_template("{{ cycler.__init__.__globals__.os.system('true') }}"), "not allowed"),
    "a template through lipsum": (_template("{{ lipsum.__globals__['os'].popen('true') }}"), "undefined|not allowed"),
    "a template through attr": (_template("{{ ''|attr('__class__')|attr('__mro__') }}"), "read"),
    "a template through a format": (_template("{{ '{0.__class__}'.format(1) }}"), "read"),
    "a template through map": (_template("{{ ['']|map(attribute='__class__')|list }}"), "not allowed|read"),
    "a template that includes a file": (_template("{% include '/etc/passwd' %}"), "cannot render"),
    # Time
    "a template that loops": (
        _template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
        "seconds|steps",
    ),
    "a regex that backtracks": (_regex("(a+)+$"), "repeats a group"),
    "a regex of choices that backtracks": (_regex("(a|aa)+$"), "repeats a group"),
    "a regex that looks behind and repeats": (_regex("(?:(a*)*)*b"), "repeats a group"),
    "a regex that takes a power of the text": (_regex("a*a*a*a*$"), "retry-limit|read"),
    "a regex that is none": (_regex("(a"), "is not read from character 3"),
    "a regex of a great count": (
        _regex("(((a{1000}){1000}){1000})"),
        "written out",
    ),
    "a normalizer that grows its text": (
        _tokenizer(
            normalizer={
                "type": "Sequence",
                "normalizers": [
                    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10} for _ in range(12)
                ],
            }
        ),
        "grows",
    ),
    "the same, met while the file is read": (
        _tokenizer(normalizer={"type": "Sequence", "normalizers": [TENFOLD] * 12}, added_tokens=[NORMALIZED]),
        "grows",
    ),
    "the same, spelled otherwise": (
        _rewritten('"normalizer"', r'"normali\u007aer"', normalizer=TENFOLDS, added_tokens=[NORMALIZED]),
        "grows",
    ),
    "the same, given twice": (
        _rewritten(
            '"version"', '"normalizer": {"type": "NFC"}, "version"', normalizer=TENFOLDS, added_tokens=[NORMALIZED]
        ),
        "grows",
    ),
    "a normalizer of no type": (
        _tokenizer(normalizer={"pattern": {"String": "a"}, "content": "a" * 1000}),
        "not known",
    ),
    "a normalizer whose map makes much": (_tokenizer(normalizer=LONG_MAP), "grows"),
    "a normalizer that puts much in front": (
        _tokenizer(normalizer={"type": "Prepend", "prepend": "z" * 4000}),
        "grows",
    ),
    "a normalizer that puts much between": (
        _tokenizer(normalizer={"type": "Replace", "pattern": {"Regex": "x*"}, "content": "z" * 4000}),
        "grows",
    ),
    "a million normalizers": (
        _tokenizer(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 1000}),
        "steps",
    ),
    "many pre-tokenizers": (
        _tokenizer(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}] * 1000}),
        "steps",
    ),
    "a decoder that doubles": (_tokenizer(decoder={"type": "Sequence", "decoders": [TWOFOLD] * 40}), "decoder"),
    "a decoder that makes much": (_tokenizer(decoder={**TWOFOLD, "content": "z" * 10_000_000}), "its decoder"),
    "a post-processor that repeats": (_tokenizer(post_processor=_around([0], 1000)), "its post_processor"),
    "a post-processor of many tokens": (_tokenizer(post_processor=_around([0] * 100_000, 1)), "tokens around"),
    "a token of a million characters": (
        _tokenizer(added_tokens=[{**NORMALIZED, "content": "a" * 1_000_000}]),
        "token of",
    ),
    "a prefix of a million characters": (
        _tokenizer(
            model={"type": "BPE", "vocab": {"a": 0}, "merges": [], "continuing_subword_prefix": "z" * 1_000_000}
        ),
        "continuing_subword_prefix",
    ),
    "tokenizer.json of brackets in a list": (_write("tokenizer.json", '{"a": [' + "[]," * 2_000_000 + "0]}"), "values"),
    "tokenizer_config.json of a million objects": (
        _write("tokenizer_config.json", '{"a": [' + "{}," * 1_000_000 + "0]}"),
        "values",
    ),
    "a pipe among further templates": (_inside("additional_chat_templates", _pipe("x.jinja")), "not a regular file"),
    "a thousand further templates": (_inside("additional_chat_templates", _many_templates), "chat templates"),
    "a link to a file without end": (_link("tokenizer_config.json", "/proc/self/pagemap"), "outside"),
    "the same for tokenizer.json": (_link("tokenizer.json", "/proc/self/pagemap"), "outside"),
    "the same for the template": (_link("chat_template.jinja", "/proc/self/pagemap"), "outside"),
    "a link to a device": (_link("tokenizer.json", "/dev/zero"), "outside"),
    "a link to a long name": (_link("tokenizer.json", "x" * 300), "cannot read"),
    "generation_config.json that links to a long name": (_link("generation_config.json", "x" * 300), "cannot look for"),
    "a link to itself": (_link("special_tokens_map.json", "special_tokens_map.json"), "cannot read"),
    "a SentencePiece model of a terabyte": (_without_json(_huge("tokenizer.model")), "at most"),
    "a SentencePiece model without end": (
        _without_json(_link("tokenizer.model", "/proc/self/pagemap")),
        "outside",
    ),
    "a vocabulary that is a pipe": (_without_json(_pipe("vocab.json")), "not a regular file"),
    "a template that makes bytes": (_template("{{ ('a'.encode() * 10000000000) | length }}"), "not allowed"),
    "a template that rounds": (_template("{{ 1 | round(1000000000, 'ceil') }}"), "not allowed"),
    "a template that strips": (
        _template("{% set s = 'a' * 1000000 %}{{ s.strip('b' * 1000000 ~ 'a') }}"),
        "not allowed",
    ),
    "a template of many parts": (_template("{{a}}" * 25_000), "not valid Jinja"),
    "a pipe in the place of config.json": (_pipe("config.json"), "not a regular file"),
    "a pipe in the place of tokenizer.json": (_pipe("tokenizer.json"), "not a regular file"),
    "a pipe in the place of the template": (_pipe("chat_template.jinja"), "not a regular file"),
    "4,096 patterns of modules": (_many_rules, "too costly"),
    "a number of two million digits": (_digits("config.json"), "not valid JSON"),
    "generation_config.json with such a number": (_digits("generation_config.json"), "not valid JSON"),
    # Memory
    "config.json of a million objects": (
        _write("config.json", '{"a":[' + "{}," * 1_000_000 + "{}]}"),
        "brackets and commas",
    ),
    "generation_config.json of a million objects": (
        _write("generation_config.json", '{"a":[' + "{}," * 1_000_000 + "{}]}"),
        "brackets and commas",
    ),
    "config.json of a terabyte": (_huge("config.json"), "at most"),
    "tokenizer.json of a terabyte": (_huge("tokenizer.json"), "at most"),
    "tokenizer_config.json of a terabyte": (_huge("tokenizer_config.json"), "at most"),
    "a template of a terabyte": (_huge("chat_template.jinja"), "at most"),
    "generation_config.json of a terabyte": (_huge("generation_config.json"), "at most"),
    "a template that doubles": (
        _template("{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"),
        "not allowed",
    ),
    "a vocabulary of 2**40": (_config(vocab_size=2**40), "vocab_size"),
    "2**31 layers": (_config(num_hidden_layers=2**31), "num_hidden_layers"),
    "a hidden size of 2**62": (_config(hidden_size=2**62), "hidden_size"),
    "a context of 10**12": (_config(max_position_embeddings=10**12), "read"),
    "no heads": (_config(num_attention_heads=0), "num_attention_heads"),
    "an epsilon that is no number": (_config(rms_norm_eps=float("nan")), "rms_norm_eps"),
    "a rope of 10**9 factors": (_config(rope_scaling={"rope_type": "llama3", "factor": 1e308}), "rope|read"),
    "a million end tokens": (_config(eos_token_id=list(range(10**6))), "at most"),
    "100,000 end tokens": (_config(eos_token_id=list(range(10**5))), "read|eos"),
    "token ids of 2**62": (
        _write("tokenizer_config.json", json.dumps({"added_tokens_decoder": {str(2**62): {"content": "<x>"}}})),
        "read|added_tokens|token",
    ),
    "a token id of 10,000 digits": (
        _write("tokenizer_config.json", json.dumps({"added_tokens_decoder": {"9" * 10_000: {"content": "<x>"}}})),
        "added_tokens|token",
    ),
    # Depth
    "config.json of brackets": (_write("config.json", DEEP), "not valid JSON"),
    "tokenizer.json of brackets": (_write("tokenizer.json", DEEP), "not a readable tokenizer"),
    "tokenizer_config.json of brackets": (_write("tokenizer_config.json", DEEP), "not readable JSON"),
    "generation_config.json of brackets": (_write("generation_config.json", DEEP), "not valid JSON"),
    "a template of brackets": (_template("{{ " + "(" * 100_000), "not valid Jinja"),
    "a template of ifs": (_template("{% if 1 %}" * 50_000), "not valid Jinja"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, int, str, list[str], Path]]:
    root = tmp_path_factory.mktemp("hostile")
    folders = []
    for number, (change, _) in enumerate(CASES.values()):
        folder = root / str(number)
        shutil.copytree(FIXTURE, folder)
        change(folder)
        folders.append(str(folder))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(folders), capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"after {len(lines)} folders: {done.stderr[-3000:]}"
    return {
        name: (seconds, grew, said, own, Path(folder))
        for name, (folder, seconds, grew, said, own) in zip(CASES, lines, strict=True)
    }


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_folder(outcomes: dict[str, tuple[float, int, str, list[str], Path]], name: str) -> None:
    seconds, grew, said, own, folder = outcomes[name]
    assert any(part in said for part in CASES[name][1].split("|")), said
    assert len(said) < 3000
    # A template may use up its own five seconds, at a request.
    assert seconds < (6 if "template" in name else 5)
    assert grew < 100 * 2**20, grew
    assert not own
    assert not list(folder.glob("*.was_run"))
