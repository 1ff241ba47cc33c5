"""Conversion by transformers: what its process is given, what it may take, and how its failures are told.

Most tests put a module in the place of transformers that does what a hostile file makes the library do. Processor time
and memory are what is bounded; where a test waits for the clock, any process is too slow.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from qengine.errors import ConfigError, LoadError
from qengine.tokenizer import conversion, load_tokenizer
from qengine.tokenizer.conversion import ConversionLimits, convert_slow
from tests.tokenizer.conftest import FIXTURES

MIB = 2**20
FakeLibrary = Callable[[str], None]


@pytest.fixture
def fake_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    """Puts a module in the place of transformers, which does what is given when it is asked for a tokenizer."""

    def make(body: str) -> None:
        packages = tmp_path / "packages"
        packages.mkdir()
        lines = "\n".join(f"        {line}" for line in body.splitlines())
        text = "import json, os, signal, sys, time\nfrom pathlib import Path\nimport tokenizers\n"
        text += "class AutoTokenizer:\n    @staticmethod\n"
        text += f"    def from_pretrained(folder, local_files_only, trust_remote_code):\n{lines}\n"
        (packages / "transformers.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(packages))

    return make


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that has to be converted."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "vocab.json").write_text("{}")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("body", "limits", "message"),
    [
        ("kept = bytearray(2**40)", ConversionLimits(memory_bytes=2**30), "takes more than 1 GiB of memory"),
        (
            "kept = ['a' * 1000 + str(number) for number in range(500_000)]",
            ConversionLimits(memory_bytes=64 * MIB),
            r"takes more than 0\.0625 GiB of memory",
        ),
        (
            "while True: pass",
            ConversionLimits(processor_seconds=1, seconds=60),
            "takes more than 1 s of processor time",
        ),
        ("os.kill(os.getpid(), signal.SIGSTOP)", ConversionLimits(seconds=0.5), r"takes more than 0\.5 s;"),
        ("os.abort()", ConversionLimits(), r"was ended by signal 6; it may take 2 GiB of memory\)"),
        ("raise ValueError('a\\nb' + 'c' * 100_000)", ConversionLimits(), r"\(a bc{100,400}\.\.\.\); try: pip"),
        ("sys.stderr.write('first\\n\\x1b[31mlast\\n'); os._exit(9)", ConversionLimits(), r"\(\[31mlast\)"),
        ("os._exit(9)", ConversionLimits(), "it does not say why"),
        ("return object()", ConversionLimits(), "object has no fast form"),
    ],
)
def test_a_conversion_that_fails_or_takes_too_much_is_an_error(
    model: Path,
    fake_library: FakeLibrary,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    body: str,
    limits: ConversionLimits,
    message: str,
) -> None:
    monkeypatch.setattr(conversion, "_GRACE_SECONDS", 0.1)
    fake_library(body)
    with pytest.raises(LoadError, match=message) as caught:
        convert_slow(model, limits)
    assert str(caught.value).startswith(f"{model} has no tokenizer.json")
    assert "tokenizer.json of the original model" in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert capfd.readouterr() == ("", "")


def test_a_process_ends_itself_even_if_nobody_waits(
    model: Path, fake_library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "_GRACE_SECONDS", 600.0)
    fake_library("time.sleep(600)")
    with pytest.raises(LoadError, match=r"takes more than 2 s;"):
        convert_slow(model, ConversionLimits(seconds=2.0))


def test_a_number_of_special_tokens_takes_no_more_memory_than_is_allowed(tmp_path: Path) -> None:
    """The real library makes a text of each."""
    config = {"pattern": "a", "default_num_special_tokens": 10**10}
    (tmp_path / "tekken.json").write_text(json.dumps({"config": config, "special_tokens": [], "vocab": []}))
    with pytest.raises(LoadError, match=r"takes more than 0\.25 GiB of memory; copy tokenizer\.json"):
        convert_slow(tmp_path, ConversionLimits(memory_bytes=256 * MIB, processor_seconds=10))


def test_the_process_has_no_secrets_and_is_not_interrupted(
    model: Path, fake_library: FakeLibrary, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secrets = {"QENGINE_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"}
    for name in secrets:
        monkeypatch.setenv(name, "secret")
    started_in = tmp_path / "anywhere"
    started_in.mkdir()
    for name in ("jinja2", "tokenizers", "qengine"):
        (started_in / f"{name}.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w').close()")
    monkeypatch.chdir(started_in)
    fake_library(
        f"seen = sorted({secrets} & set(os.environ))\n"
        "raise ValueError(f'{seen} {signal.getsignal(signal.SIGINT).name} {sys.stdin.read()!r}')"
    )
    with pytest.raises(LoadError, match=r"\(\[\] SIG_IGN ''\)"):
        convert_slow(model)
    assert not (tmp_path / "was_run").exists()


def test_nothing_is_kept_for_the_next_conversion(model: Path, fake_library: FakeLibrary) -> None:
    """tiktoken keeps what it has read by its path, which would be the same for the next model's file."""
    fake_library(
        "import tempfile\n"
        "own = [tempfile.gettempdir(), os.environ['HF_HOME'], str(Path(folder).parent)]\n"
        "raise ValueError(f\"{set(own) == {os.getcwd()}} {os.environ['TIKTOKEN_CACHE_DIR']!r}\")"
    )
    with pytest.raises(LoadError, match=r"\(True ''\)"):
        convert_slow(model)


def test_configurations_name_no_files(model: Path, fake_library: FakeLibrary) -> None:
    path = "/elsewhere/x"
    hostile = {
        "fast_tokenizer_files": [path],
        "tokenizer_file": path,
        "configuration_files": [path],
        "vocab": path,
        "merges": path,
        "init_inputs": [path],
        "sp_model_kwargs": {"model_file": path},
        "auto_map": {"AutoTokenizer": [path, path]},
        "sudachi_config_path": path,
    }
    good = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": True,
        "eos_token": {"content": "a"},
        "added_tokens_decoder": {"0": {"content": "a"}},
    }
    names = ("config.json", "tokenizer_config.json", "special_tokens_map.json")
    for name in names:
        (model / name).write_text(json.dumps({**hostile, **good}))
    (model / "added_tokens.json").write_text(json.dumps({"x_file": 5, "y": path}))
    (model / "other.json").write_text(path)
    fake_library(
        "texts = {path.name: path.read_text() for path in Path(folder).iterdir()}\n"
        f"named = [name for name, text in texts.items() if {path!r} in text]\n"
        "kept = {name: sorted(json.loads(text)) for name, text in sorted(texts.items())}\n"
        "raise ValueError(json.dumps([named, list(kept.values())]))"
    )
    kept = [["x_file"], ["tokenizer_class"], ["added_tokens_decoder", "eos_token"], sorted(good), []]
    with pytest.raises(LoadError) as caught:
        convert_slow(model)
    assert f"({json.dumps([[], kept])});" in str(caught.value)


BACKEND = "backend = tokenizers.Tokenizer(tokenizers.models.BPE({'a': 0, 'b': 1, 'ab': 2}, [('a', 'b')]))\n"
RETURN = "return type('Slow', (), {'backend_tokenizer': backend})()"


def test_what_is_converted_is_what_the_library_made(
    model: Path, fake_library: FakeLibrary, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_library(BACKEND + "backend.add_special_tokens(['<s>'])\nprint('noise')\n" + RETURN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "packages")
    expected = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    expected.add_special_tokens(["<s>"])
    assert convert_slow(model).to_str() == expected.to_str()


def test_what_is_converted_is_judged_like_a_file(model: Path, fake_library: FakeLibrary) -> None:
    steps = "[tokenizers.normalizers.Replace('a', 'a' * 10)] * 12"
    fake_library(BACKEND + f"backend.normalizer = tokenizers.normalizers.Sequence({steps})\n" + RETURN)
    with pytest.raises(LoadError, match=r"as transformers converts it,.* normalizer"):
        convert_slow(model)


def test_a_library_that_is_not_installed_is_said(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = "raise ModuleNotFoundError(\"No module named 'transformers'\", name='transformers')"
    (tmp_path / "transformers.py").write_text(error)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"needed for converting the tokenizer of .*model.*run: pip install transform"
    ):
        convert_slow(model)


def test_a_folder_with_tokenizer_json_needs_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "subprocess", None)
    assert load_tokenizer(str(FIXTURES / "llama-gptq-sym-g128")).encode("x")
