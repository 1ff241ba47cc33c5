"""The streaming driver: what it writes is what the quantizer chose, however often it was killed on the way."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors import safe_open
from transformers.models.llama.modeling_llama import LlamaMLP

import converters.export_folder
import converters.quantize
from converters.convert import convert
from converters.errors import CheckpointError, WriteError
from converters.open import open_checkpoint
from converters.quantize import quantize
from converters.quantize_identity import model_identity, model_name
from converters.quantize_outcome import Observer, Preview, Quantized
from converters.quantize_report import QuantReport
from converters.quantizers import LayerResult, LayerView, QuantizationError, quantize_layer
from converters.skeleton import OpenedModel
from converters.source import TensorSlot
from converters.tensors import ReadableCheckpoint
from quant_kernels.packed_weight import DenseWeight, PackedWeight
from quant_kernels.reference import dequantize
from tests.converters.gguf_files import gguf_model
from tests.converters.killing import run_until
from tests.converters.reference import awq_weight, compressed_weight, gptq_weight
from tests.converters.tiny_models import (
    ARCHITECTURES,
    Letters,
    make_model,
    save_model,
    tiny_folder,
    write_texts,
)


def run(model: Path, out: Path, **more: Any) -> Quantized:
    """Quantize a tiny model in groups of 16, calibrated on the texts beside it where that is needed."""
    options = {"group_size": 16, "method": "gptq", "seq_len": 38, "device": "cpu", "encoder": Letters(), **more}
    texts = model.parent / "texts.jsonl"
    if not texts.exists():
        write_texts(texts)
    return quantize(model, out, **{"calibration": str(texts), **options})


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    source: Any = open_checkpoint(folder)
    file: ReadableCheckpoint = source._tensors
    return {name: file.read(name) for name in file.tensors}


class Recorder:
    """Passes layers on to the real quantizer and keeps what it chose."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.weights: dict[str, PackedWeight] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        monkeypatch.setattr(converters.quantize, "quantize_layer", self)

    def __call__(self, view: LayerView, inputs: Any, settings: Any) -> LayerResult:
        result = quantize_layer(view, inputs, settings)
        self.weights |= {f"{view.name}.{own}": weight for own, weight in result.weights.items()}
        self.tensors |= {f"{view.name}.{own}": tensor for own, tensor in result.tensors.items()}
        return result


def numpy_weight(tensors: Mapping[str, torch.Tensor], name: str, format: str) -> Any:
    parts = {key: tensors.get(f"{name}.{key}") for key in ("qweight", "qzeros", "scales", "g_idx")}
    if format == "compressed-tensors":
        return compressed_weight(dict(tensors), name, 4)
    assert parts["qweight"] is not None
    assert parts["qzeros"] is not None
    assert parts["scales"] is not None
    if format == "awq":
        return awq_weight(parts["qweight"], parts["qzeros"], parts["scales"])
    assert parts["g_idx"] is not None
    return gptq_weight(parts["qweight"], parts["qzeros"], parts["scales"], parts["g_idx"], 4, "v1")


@pytest.mark.parametrize("format", ["awq", "gptq", "compressed-tensors"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "auto"])
def test_what_was_chosen_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, method: str) -> None:
    recorder = Recorder(monkeypatch)
    model = tiny_folder(tmp_path / "model")
    run(model, tmp_path / "out", method=method, format=format, sym=False)
    tensors = tensors_of(tmp_path / "out")
    assert len(recorder.weights) == 14
    for name, weight in recorder.weights.items():
        assert np.array_equal(numpy_weight(tensors, name, format), dequantize(weight).numpy())
    for name, tensor in recorder.tensors.items():
        assert torch.equal(tensors[name], tensor)
    original = tensors_of(model)
    for name, tensor in original.items():
        if name in tensors and name not in recorder.tensors:
            assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_architecture(tmp_path: Path, architecture: str, tied: bool) -> None:
    model = save_model(tmp_path / "model", make_model(architecture, tie_word_embeddings=tied), torch.bfloat16)
    run(model, tmp_path / "out")
    source = open_checkpoint(tmp_path / "out", "gptq")
    opened = OpenedModel.check(source)
    assert opened.tied == tied
    assert config_of(tmp_path / "out")["architectures"] == [architecture]
    assert tensors_of(tmp_path / "out")["model.norm.weight"].dtype == torch.bfloat16


def test_activation_order(tmp_path: Path) -> None:
    for format in ("gptq", "compressed-tensors"):
        run(tiny_folder(tmp_path / "model"), tmp_path / format, format=format, act_order=True)
        OpenedModel.check(open_checkpoint(tmp_path / format))
    said = config_of(tmp_path / "gptq")["quantization_config"]
    orders = [t for name, t in tensors_of(tmp_path / "gptq").items() if name.endswith(".g_idx")]
    assert said["desc_act"] == any(not torch.equal(order, order.sort().values) for order in orders)


def test_one_group_has_no_activation_order(tmp_path: Path) -> None:
    """compressed-tensors refuses strategy "channel" with an order, and so do the programs that read by it."""
    run(tiny_folder(tmp_path / "model"), tmp_path / "out", format="compressed-tensors", act_order=True, group_size=-1)
    weights = config_of(tmp_path / "out")["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert weights["strategy"] == "channel"
    assert weights["actorder"] is None
    assert not [name for name in tensors_of(tmp_path / "out") if name.endswith("g_idx")]


def test_what_stays_dense_of_a_packed_source_has_16_bits(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", make_model(), torch.bfloat16)
    run(model, tmp_path / "packed", method="rtn", format="gptq", lm_head=True)
    run(tmp_path / "packed", tmp_path / "out", method="rtn", skip=r"layers\.0\.|lm_head")
    dense = weights_that_are_dense(tmp_path / "out")
    assert len([name for name in dense if name.startswith("model.layers.0.")]) == 7
    assert "lm_head" in dense
    assert {tensor.dtype for tensor in dense.values()} == {torch.bfloat16}


def weights_that_are_dense(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name.removesuffix(".weight"): tensor
        for name, tensor in tensors_of(folder).items()
        if name.endswith(("proj.weight", "lm_head.weight"))
    }


def test_modules_that_are_skipped(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    dense = {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"}
    for format in ("awq", "gptq", "compressed-tensors"):
        out = tmp_path / format
        run(model, out, format=format, skip=r"q_proj|layers\.1\.mlp\.down")
        source = open_checkpoint(out)
        opened = OpenedModel.check(source)
        linears = [slot for slot in opened.skeleton.layer(0) + opened.skeleton.layer(1) if hasattr(slot, "has_bias")]
        found = {slot.name for slot in linears if isinstance(source.read_linear(slot), DenseWeight)}
        assert found == dense
        said = config_of(out)["quantization_config"]
        if format == "gptq":
            assert {key[2:].replace("\\", "").rstrip("$") for key in said["dynamic"]} == dense
        else:
            assert set(said["modules_to_not_convert" if format == "awq" else "ignore"]) == {*dense, "lm_head"}
    with pytest.raises(CheckpointError, match="leaves no linear"):
        run(model, tmp_path / "none", skip=".")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_the_head_is_quantized_on_demand(tmp_path: Path, tied: bool, format: str) -> None:
    """A head that was the embedding becomes one of its own."""
    model = tiny_folder(tmp_path / "model", tie_word_embeddings=tied)
    done = run(model, tmp_path / "out", lm_head=True, format=format)
    source = open_checkpoint(tmp_path / "out")
    opened = OpenedModel.check(source)
    assert not opened.tied
    assert not config_of(tmp_path / "out")["tie_word_embeddings"]
    head: Any = opened.skeleton.after(tied=False)[-1]
    assert isinstance(source.read_linear(head), PackedWeight)
    assert done.report[-1].name == "lm_head"
    assert torch.equal(
        tensors_of(tmp_path / "out")["model.embed_tokens.weight"], tensors_of(model)["model.embed_tokens.weight"]
    )


def test_what_a_checkpoint_says_of_itself(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    (model / "generation_config.json").write_text('{"temperature": 0.6}')
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "LICENSE").write_text("free")
    (model / "modeling_own.py").write_text("raise SystemExit")
    run(model, tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        *("README.md", "LICENSE", "chat_template.jinja", "config.json", "generation_config.json"),
        *("manifest.json", "model.safetensors", "quantize_config.json", "report.json"),
    }
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    found = digests(tmp_path / "out")
    found.pop("manifest.json")
    assert {name: file["sha256"] for name, file in manifest["files"].items()} == found
    said = config_of(tmp_path / "out")["quantization_config"]
    assert said == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert said["checkpoint_format"] == "gptq"
    assert said["sym"] is True
    assert said["meta"]["quantizer"][0].startswith("qengine:")
    assert said["meta"]["calibration_samples"] == 6
    assert "texts.jsonl" in (tmp_path / "out" / "README.md").read_text()


class _FortyLetters(Letters):
    """For a vocabulary of 40."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Sequence[int]:
        return [byte % 40 for byte in text.encode()]


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Its blocks are expanded and quantized anew; what stays dense takes the type that the config names."""
    recorder = Recorder(monkeypatch)
    model = gguf_model(tmp_path / "model.gguf", Kind.Q4_1)
    run(model, tmp_path / "out", method=method, encoder=_FortyLetters())
    tensors = tensors_of(tmp_path / "out")
    assert len(recorder.weights) == 7
    for name, weight in recorder.weights.items():
        assert np.array_equal(numpy_weight(tensors, name, "awq"), dequantize(weight).numpy())
    original = open_checkpoint(model)
    table = original.read_tensor(TensorSlot("model.embed_tokens.weight", (40, 64)))
    assert torch.equal(tensors["model.embed_tokens.weight"], table.half())
    assert config_of(tmp_path / "out")["quantization_config"]["quant_method"] == "awq"
    OpenedModel.check(open_checkpoint(tmp_path / "out"))


# Killed and resumed


class _Log(Observer):
    """A line in a file for each layer that is done, over all runs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def finished(self, part: int, num_parts: int, report: object, seconds: float) -> None:
        with open(self.path, "a") as file:
            file.write(f"{part}\n")


def _whole(model: Path, out: Path, resume: bool, log: Path) -> None:
    torch.set_num_threads(1)
    run(model, out, resume=resume, observer=_Log(log))


def test_killed_anywhere_and_resumed_it_is_the_same(tmp_path: Path) -> None:
    """SIGKILL at random places and at each of the last: nothing has the output's name but what is complete, and the
    next run ends the same without doing a finished layer again."""
    model = tiny_folder(tmp_path / "model")
    write_texts(tmp_path / "texts.jsonl")
    clean = tmp_path / "clean" / "out"
    count = run_until(_whole, (model, clean, False, tmp_path / "log"), clean.parent, None)
    assert count is not None
    expected = digests(clean)
    last = range(count - 8, count + 1)
    for place in [*sorted(random.Random(0).sample(range(2, last.start), 6)), *last]:
        out, log = tmp_path / f"killed-{place}" / "out", tmp_path / f"log-{place}"
        killed = run_until(_whole, (model, out, False, log), out.parent, place)
        assert killed is None
        if out.exists():
            assert digests(out) == expected
            continue
        with pytest.raises(CheckpointError, match="not finished"):
            open_checkpoint(out.with_name("out.partial"))
        assert run_until(_whole, (model, out, True, log), out.parent, None) is not None
        assert digests(out) == expected
        assert [file.name for file in out.parent.iterdir()] == ["out"]
        # The process may die after a layer was saved and before its line was written.
        assert log.read_text() in ("0\n1\n", "0\n", "1\n"), f"layers were done twice after a kill at {place}"


class _StopAt(Observer):
    def __init__(self, part: int) -> None:
        self.part = part
        self.begun: list[int] = []

    def begins(self, preview: Preview) -> None:
        self.begun.append(preview.num_finished)

    def finished(self, part: int, num_parts: int, report: object, seconds: float) -> None:
        if part == self.part:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    model, observer = tiny_folder(tmp_path / "model"), _StopAt(0)
    run(model, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out", observer=observer)
    with pytest.raises(CheckpointError, match="--resume"):
        run(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match="group_size was 16, now 32"):
        run(model, tmp_path / "out", resume=True, group_size=32)
    run(model, tmp_path / "out", resume=True, observer=observer)
    assert observer.begun == [0, 1]
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_complete_result_that_lacks_its_name_is_kept(tmp_path: Path) -> None:
    """What is in the way appears after the start; later the same command finishes, another one is told to stop."""
    model, out = tiny_folder(tmp_path / "model"), tmp_path / "out"
    run(model, tmp_path / "whole")

    class Meanwhile(Observer):
        def finished(self, part: int, num_parts: int, report: object, seconds: float) -> None:
            (out / "other").mkdir(parents=True, exist_ok=True)

    with pytest.raises(WriteError, match=r"cannot rename .*out\.partial to .*only the name is missing"):
        run(model, out, observer=Meanwhile())
    partial = digests(tmp_path / "out.partial")
    assert partial == digests(tmp_path / "whole")
    (out / "other").rmdir()
    with pytest.raises(CheckpointError, match="complete checkpoint that only lacks its name: --resume gives"):
        run(model, out)
    with pytest.raises(CheckpointError, match="complete checkpoint that only lacks its name: rename it to out"):
        convert(model, out, "dense")
    with pytest.raises(CheckpointError, match=r"of another run \(group_size was 16, now 32\)"):
        run(model, out, resume=True, group_size=32)
    assert digests(tmp_path / "out.partial") == partial
    observer = _StopAt(0)
    done = run(model, out, resume=True, observer=observer)
    assert observer.begun == [2]
    assert digests(out) == partial
    assert done.num_bytes > 0
    assert len(done.report) == 14
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "texts.jsonl", "whole"]


@pytest.mark.parametrize("where", ["replace_file", "sync_folder"])
def test_ctrl_c_at_the_very_end_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    model, out = tiny_folder(tmp_path / "model"), tmp_path / "out"
    run(model, tmp_path / "whole")
    with monkeypatch.context() as patched:

        def interrupted(*args: object) -> None:
            raise KeyboardInterrupt

        patched.setattr(converters.export_folder, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(model, out)
    observer = _StopAt(0)
    run(model, out, resume=True, observer=observer)
    assert observer.begun == [2]
    assert digests(out) == digests(tmp_path / "whole")


def test_conversion_leaves_the_work_of_a_quantization(tmp_path: Path) -> None:
    model, observer = tiny_folder(tmp_path / "model"), _StopAt(0)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out", observer=observer)
    with pytest.raises(CheckpointError, match=r"work of an earlier run .* qengine quantize --resume"):
        convert(model, tmp_path / "out", "dense")
    run(model, tmp_path / "out", resume=True, observer=observer)
    assert observer.begun == [0, 1]


def test_another_machine_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Threads decide the last bits of sums: the run goes on, and says that its bytes are its own."""
    model, threads = tiny_folder(tmp_path / "model"), torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out", observer=_StopAt(0))
    try:
        torch.set_num_threads(threads + 1)
        with caplog.at_level(logging.WARNING, "converters"):
            run(model, tmp_path / "out", resume=True)
    finally:
        torch.set_num_threads(threads)
    assert f"computed elsewhere (threads was {threads}, now {threads + 1})" in caplog.text


def test_all_parts_of_a_split_model_count(tmp_path: Path) -> None:
    names = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "other-00001-of-00002.gguf", "m-00001-of-00003.gguf"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    before = model_identity(tmp_path / names[0])
    assert [entry[0] for entry in before] == names[:2]
    (tmp_path / names[1]).write_bytes(b"xy")
    assert model_identity(tmp_path / names[0]) != before


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen2.5-7B-Instruct", "Qwen2.5-7B-Instruct"),
        ("a/Llama-3.1-8B-Instruct/", "Llama-3.1-8B-Instruct"),
        ("smollm2-135M-Q8_0.gguf", "smollm2-135M-Q8_0"),
        ("m-1.5-00001-of-00003.gguf", "m-1.5"),
        ("hub/models--Qwen--Qwen2.5-7B-Instruct/snapshots/" + 40 * "a", "Qwen2.5-7B-Instruct"),
        ("a/Phi-3.5/../Phi-4.1/..", "a"),
    ],
)
def test_names_of_models(path: str, name: str) -> None:
    assert model_name(Path(path)) == name


def test_the_name_is_in_manifest_header_and_card(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "Llama-3.1-8B")
    run(model, tmp_path / "out", method="rtn")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["made_from"] == "Llama-3.1-8B"
    assert (tmp_path / "out" / "README.md").read_text().startswith("# Llama-3.1-8B, 4-bit awq")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata()["made_from"] == "Llama-3.1-8B"


def test_named_chat_templates_are_carried_over(tmp_path: Path) -> None:
    """As transformers saves them; nothing else of that folder is."""
    model = tiny_folder(tmp_path / "model")
    templates = model / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ tools }}")
    (templates / "code.py").write_text("raise SystemExit")
    run(model, tmp_path / "out", method="rtn")
    copied = tmp_path / "out" / "additional_chat_templates"
    assert [file.name for file in copied.iterdir()] == ["tool_use.jinja"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    expected = hashlib.sha256(b"{{ tools }}").hexdigest()
    assert manifest["files"]["additional_chat_templates/tool_use.jinja"]["sha256"] == expected


def test_what_became_of_each_linear_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hessian that no damping helps: the note is in the checkpoint, and the script prints it."""
    monkeypatch.setattr("converters.quantizers.linear.factorize", lambda *args: None)
    model = tiny_folder(tmp_path / "model")
    done = run(model, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["request"]["method"] == "gptq"
    assert report["request"]["group_size"] == 16
    assert len(report["linears"]) == 14
    assert all("rounded to nearest" in line["notes"][0] for line in report["linears"])
    assert QuantReport.read(tmp_path / "out").linears == done.report


def test_resume_with_nothing_to_go_on_with_begins(tmp_path: Path) -> None:
    run(tiny_folder(tmp_path / "model"), tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "manifest.json").exists()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")

    class Second(Observer):
        def begins(self, preview: Preview) -> None:
            with pytest.raises(CheckpointError, match="another process"):
                run(model, tmp_path / "out", resume=True)

    run(model, tmp_path / "out", observer=Second())


# What is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "magic"}, "known: awq, gptq, rtn, auto"),
        ({"bits": 3}, "expected 4 or 8"),
        ({"group_size": 7}, "multiple of 8"),
        ({"format": "gguf"}, "known: awq, gptq, compressed-tensors"),
        ({"format": "awq", "bits": 8}, "awq cannot express 8 bits"),
        ({"format": "awq", "act_order": True}, "awq cannot express an activation order"),
        ({"format": "awq", "lm_head": True}, "awq cannot express a quantized head"),
        ({"method": "rtn", "act_order": True}, "not of rtn"),
        ({"skip": "("}, "no regular expression"),
        ({"format": "awq", "group_size": 128}, "--group-size 32 fits"),
        ({"device": "tpu"}, "tpu"),
        ({"device": "cuda:77"}, "cuda:77"),
    ],
)
def test_requests_that_contradict_themselves(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    model = tiny_folder(tmp_path / "model")
    with pytest.raises(CheckpointError) as caught:
        run(model, tmp_path / "out", **options)
    assert words in str(caught.value)
    assert sorted(file.name for file in tmp_path.iterdir()) in (["model"], ["model", "texts.jsonl"])


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file"), (b"", "empty"), (b"\0\1\2", "binary"), (b"one line", "one line")],
    ids=["missing", "empty", "binary", "one line"],
)
def test_calibration_that_is_none(tmp_path: Path, content: bytes | None, words: str) -> None:
    texts = tmp_path / "own.txt"
    if content is not None:
        texts.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        run(tiny_folder(tmp_path / "model"), tmp_path / "out", calibration=str(texts))
    assert words in str(caught.value)
    assert "own.txt" in str(caught.value)
    assert not (tmp_path / "out.partial").exists()


def test_an_output_that_is_the_model_or_in_it(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    before = digests(model)
    for out, words in ((model, "the model itself"), (model / "out", "inside the model"), (tmp_path, "exists")):
        with pytest.raises(CheckpointError) as caught:
            run(model, out)
        assert words in str(caught.value) or "the model itself" in str(caught.value)
    (tmp_path / "link").symlink_to(model)
    with pytest.raises(CheckpointError):
        run(model, tmp_path / "link")
    assert digests(model) == before


def test_weights_that_are_nan_name_the_layer(tmp_path: Path) -> None:
    bad = torch.ones(64).half()
    bad[3] = torch.nan
    made = make_model()
    model = save_model(tmp_path / "model", made, change={"model.layers.1.input_layernorm.weight": bad})
    with pytest.raises(QuantizationError, match=r"model\.layers\.1\.input_layernorm\.weight"):
        run(model, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_what_overflows_between_linears_names_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of one length run side by side, in another order than they are numbered: 5 is row 2 of batch 1."""
    rows = [{"text": text} for text in ("abcd" * 5, "ab" * 6, "abce" * 5, "abcf" * 5, "ac" * 6, "ad" * 5 + "=<")]
    texts = tmp_path / "own.jsonl"
    texts.write_text("\n".join(map(json.dumps, rows)))

    def overflowing(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        gated = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if x.shape[:2] == (3, 12):
            gated[2] = torch.inf
        return self.down_proj(gated)

    monkeypatch.setattr(LlamaMLP, "forward", overflowing)
    monkeypatch.setattr(converters.quantize._Run, "_require_finite", lambda *args: None)
    with pytest.raises(QuantizationError, match=r"layers\.0\.mlp\.down_proj: calibration sample 5 gives inputs"):
        run(tiny_folder(tmp_path / "model"), tmp_path / "out", calibration=str(texts))


def test_an_input_that_is_nan_names_layer_and_sample(tmp_path: Path) -> None:
    """Token 61 overflows in the first layer; only the third sample has it."""
    table = make_model().state_dict()["model.embed_tokens.weight"].half()
    table[61] = torch.inf
    model = save_model(tmp_path / "model", make_model(), change={"model.embed_tokens.weight": table})
    rows = [{"text": text} for text in ("abcdefgh" * 3, "hgfedcba" * 3, "abcd" + chr(61) + "ab" * 8, "bcda" * 6)]
    texts = tmp_path / "own.jsonl"
    texts.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(QuantizationError, match=r"embed_tokens.*sample 2 \(21 tokens") as caught:
        run(model, tmp_path / "out", calibration=str(texts))
    assert "NaN or infinity" in str(caught.value)
