"""`qengine quantize` and `qengine convert` from the command line: plan, table, exit codes, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from converters.open import open_checkpoint
from converters.quantize import main as script
from qengine import cli
from qengine.commands import quantize as quantize_command
from qengine.commands.making import shown_name
from qengine.errors import QEngineError
from qengine.runtime.locate import ModelLocation
from tests.converters.test_quantize import digests
from tests.engine.fixtures import path

ROOT = Path(__file__).parents[2]
MODEL = path("llama-awq-g64")
SMALL = ("--group-size", "64", "--num-samples", "3", "--seq-len", "32", "--device", "cpu")


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    code = cli.main(list(map(str, words)))
    return (code, *capsys.readouterr())


def test_a_checkpoint_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "quantize", MODEL, tmp_path / "out", "--method", "awq", *SMALL)
    assert code == 0
    assert "awq, 4-bit, group 64, asymmetric, by awq" in out
    assert "3 samples, 96 tokens" in out
    assert "GiB of memory" in out
    assert "foreseen" in out
    assert "down_proj" in out
    assert f"run it: qengine serve {tmp_path / 'out'}" in out
    assert "fewer than 64" in err
    assert open_checkpoint(tmp_path / "out").quantization == "awq"
    code, out, _ = run(capsys, "convert", tmp_path / "out", tmp_path / "gptq", "--format", "gptq")
    assert code == 0
    assert "gptq 4-bit, 21 quantized linears" in out
    assert open_checkpoint(tmp_path / "gptq").quantization == "gptq"


def test_the_result_is_measured_and_the_card_says_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builtin text is long: a part of it is enough here."""
    evaluate = quantize_command.evaluate
    monkeypatch.setattr(quantize_command, "evaluate", lambda *a, **more: evaluate(*a, **more, max_tokens=200))
    code, out, _ = run(capsys, "quantize", MODEL, tmp_path / "out", "--method", "rtn", *SMALL, "--evaluate")
    assert code == 0
    assert "KL divergence, mean" in out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Quality" in card
    assert "| KL divergence, mean |" in card
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["files"]["README.md"]["sha256"] == digests(tmp_path / "out")["README.md"]


def test_the_result_is_measured_on_the_gpu_that_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several; the engine runs on the current one."""
    current: list[int] = []
    seen: list[tuple[list[int], str]] = []

    @contextmanager
    def device(index: int) -> Iterator[None]:
        current.append(index)
        try:
            yield
        finally:
            current.pop()

    def evaluate(*args: object, device: str, **more: object) -> None:
        seen.append(([*current], device))
        raise QEngineError("enough")

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(quantize_command, "evaluate", evaluate)
    for name in ("cuda:1", "cuda", "cpu", "auto"):
        with pytest.raises(QEngineError, match="enough"):
            quantize_command._evaluate(SimpleNamespace(out="x"), Path("y"), name)  # type: ignore[arg-type]
    assert seen == [([1], "cuda"), ([], "cuda"), ([], "cpu"), ([], "auto")]


def test_the_name_of_a_model(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen2.5-7B-Instruct" / "snapshots" / ("a" * 40)
    for place, given, name in (
        (snapshot, "Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B-Instruct"),
        (Path("./Llama-3.1-8B-Instruct/"), "./Llama-3.1-8B-Instruct/", "Llama-3.1-8B-Instruct"),
        (Path("x/m-Q4_0.gguf"), "x/m-Q4_0.gguf", "m-Q4_0"),
        (Path("/site/smollm2-q8.gguf"), "SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"),
    ):
        assert shown_name(ModelLocation(place, given)) == name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("quantize",), "quantize takes MODEL and OUT, but was given neither"),
        (("quantize", "x"), "but was given only 'x'"),
        (("quantize", "a", "b", "c"), "quantize takes MODEL and OUT, but was given 'a' and 'b' and 'c'"),
        (("quantize", "a", ""), "OUT is empty"),
        (("quantize", "no-such-model", "out"), "no model at 'no-such-model'"),
        (("quantize", "a", "b", "--sym", "--asym"), "contradict"),
        (("quantize", "a", "b", "--method", "magic"), "known: awq, gptq, rtn, auto"),
        (("quantize", "a", "b", "--bits", "3"), "--bits is 3, expected 4 or 8"),
        (("quantize", "a", "b", "--group-size", "7"), "--group-size is 7"),
        (("quantize", "a", "b", "--num-samples", "0"), "--num-samples is 0"),
        (("quantize", "a", "b", "--skip", "("), "no regular expression"),
        (("quantize", "a", "b", "--format", "awq", "--lm-head"), "awq cannot express a quantized head"),
        (("convert", "a", "b"), "--format is missing"),
        (("convert", "a", "b", "--format", "gtpq"), "did you mean"),
        (("convert", "a", "b", "--format", "dense", "--dtype", "int8"), "float16, bfloat16"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    code, out, err = run(capsys, *words)
    assert code == 2
    assert message in err
    assert not out


def test_what_the_model_does_not_allow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in (
        ((tmp_path / "out", "--group-size", "96", "--method", "awq"), "--group-size"),
        ((MODEL,), "the model itself"),
        ((tmp_path,), "exists already"),
        ((tmp_path / "out", "--calibration", tmp_path / "missing.txt"), "missing.txt"),
    ):
        (tmp_path / "x").touch()
        code, _, err = run(capsys, "quantize", MODEL, *more, *([] if "--group-size" in more else SMALL))
        assert code == 2
        assert message in err
        assert err.strip().count("\n") <= 1


def test_a_disk_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (("quantize", MODEL, "/proc/out", "--method", "rtn", *SMALL),
                    ("convert", MODEL, "/proc/out", "--format", "gptq")):  # fmt: skip
        code, _, err = run(capsys, *command)
        assert code == 1
        assert "error: cannot write to /proc/out.partial" in err


def test_a_layer_that_is_nan_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*a: Any, **more: Any) -> None:
        raise QEngineError("model.layers.1.mlp.down_proj has values that are NaN")

    monkeypatch.setattr(quantize_command, "quantize", fail)
    code, _, err = run(capsys, "quantize", MODEL, tmp_path / "out")
    assert code == 1
    assert "layers.1.mlp.down_proj" in err


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    """SIGINT after the first layer: 130, the layers are kept, the message says how to go on, and --resume does."""
    words = [sys.executable, "-m", "qengine", "quantize", MODEL, str(tmp_path / "out"), *SMALL]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    state = tmp_path / "out.partial" / "work" / "state.json"
    deadline = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "of 3 layers are done and kept in" in err
    assert "--resume" in err
    assert "Traceback" not in err
    done = subprocess.run([*words, "--resume"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "done already" in done.stdout
    assert os.listdir(tmp_path) == ["out"]


def test_the_script_without_the_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script([MODEL, str(tmp_path / "out"), "--method", "rtn", "--group-size", "64", "--asym"]) == 0
    said = capsys.readouterr().out
    assert f"llama-awq-g64 -> {tmp_path / 'out'}" in said
    assert "awq, 4-bit, group 64, asymmetric, by rtn" in said
    assert "GiB of disk meanwhile" in said
    assert f"wrote {tmp_path / 'out'}" in said
    assert script([MODEL, str(tmp_path / "out"), "--method", "rtn"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_script_says_what_was_done_differently(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("converters.quantizers.linear.factorize", lambda *args: None)
    assert script([MODEL, str(tmp_path / "out"), *SMALL]) == 0
    assert "note: model.layers.0.self_attn.q_proj: the Hessian cannot be factorized" in capsys.readouterr().out
