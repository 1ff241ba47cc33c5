"""Conversion between formats: the weights stay what they are, bit for bit, and what cannot be said is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

from converters.convert import convert
from converters.errors import CheckpointError
from converters.export_files import add_section
from converters.export_formats import ExportFormat
from converters.export_tensors import ExportScheme, LinearTraits, cast, linear_tensors, scheme_of
from converters.open import open_checkpoint
from converters.quantizers import Method, QuantSettings
from converters.quantizers.grid import find_grid, group_index, pack
from converters.skeleton import OpenedModel
from converters.source import LinearSlot, TensorSlot, WeightSource
from quant_kernels.packed_weight import DenseWeight
from quant_kernels.reference import dequantize
from tests.converters.gguf_files import gguf_model
from tests.converters.killing import run_until
from tests.converters.reference import compressed_weight
from tests.converters.test_quantize import config_of, digests, run, tensors_of
from tests.converters.tiny_models import make_model, save_model, tiny_folder

FIXTURES = Path(__file__).parent.parent / "fixtures"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, expanded to float32, rows in the layer's own order."""
    source: WeightSource = open_checkpoint(folder)
    opened = OpenedModel.check(source)
    found = {}
    for slot in opened.skeleton.slots(tied=opened.tied):
        if isinstance(slot, TensorSlot):
            found[slot.name] = source.read_tensor(slot).float()
            continue
        weight = source.read_linear(slot)
        found[slot.name] = weight.weight.float() if isinstance(weight, DenseWeight) else dequantize(weight).t()
        if weight.bias is not None:
            found[f"{slot.name}.bias"] = weight.bias.float()
    return found


def assert_same(first: Path, second: Path) -> None:
    one, other = weights_of(first), weights_of(second)
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


def fixtures() -> list[str]:
    return sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())


@pytest.mark.parametrize("name", fixtures())
@pytest.mark.parametrize("format", ["awq", "gptq", "compressed-tensors"])
def test_other_programs_checkpoints_keep_their_weights(tmp_path: Path, name: str, format: ExportFormat) -> None:
    """All six fixtures into all formats, or a refusal for a reason that is so."""
    said = json.loads((FIXTURES / name / "config.json").read_text())["quantization_config"]
    try:
        convert(FIXTURES / name, tmp_path / "out", format)
    except CheckpointError as error:
        message = str(error)
        assert not list(tmp_path.iterdir())
        reasons = {
            "activation order": format == "awq" and said.get("desc_act", False),
            "8 bits": format == "awq" and said["bits"] == 8,
            "zero points of 0": format == "gptq" and not said.get("sym", False),
        }
        assert any(words in message and holds for words, holds in reasons.items()), message
        return
    assert_same(tmp_path / "out", FIXTURES / name)
    assert open_checkpoint(tmp_path / "out").quantization == format
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (FIXTURES / name / "tokenizer.json").read_bytes()


def test_there_and_back_are_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    run(model, tmp_path / "awq", method="rtn")
    convert(tmp_path / "awq", tmp_path / "ct", "compressed-tensors")
    convert(tmp_path / "ct", tmp_path / "back", "awq")
    one, other = tensors_of(tmp_path / "awq"), tensors_of(tmp_path / "back")
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_dense_is_what_transformers_loads(tmp_path: Path, dtype: str | None) -> None:
    convert(FIXTURES / "llama-awq-g64", tmp_path / "out", "dense", dtype=dtype)
    config = config_of(tmp_path / "out")
    assert "quantization_config" not in config
    wanted = getattr(torch, dtype or "bfloat16")
    assert config["torch_dtype"] == str(wanted).removeprefix("torch.")
    tensors = tensors_of(tmp_path / "out")
    assert {tensor.dtype for tensor in tensors.values()} == {wanted}
    for name, weight in weights_of(FIXTURES / "llama-awq-g64").items():
        key = name if name in tensors else f"{name}.weight"
        assert torch.equal(tensors[key], weight.to(wanted))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=wanted)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_values_that_a_type_cannot_hold(tmp_path: Path) -> None:
    """Refused by name, and not written as infinity; of float32 the default is the type with the same range."""
    large = make_model().state_dict()["model.layers.1.mlp.up_proj.weight"]
    large[3, 5] = 70000.0
    change = {"model.layers.1.mlp.up_proj.weight": large}
    model = save_model(tmp_path / "model", make_model(), torch.float32, change=change)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds values up to 70000, .* 65504"):
        convert(model, tmp_path / "out", "dense", dtype="float16")
    assert not list(tmp_path.glob("out*"))
    convert(model, tmp_path / "out", "dense")
    tensors = tensors_of(tmp_path / "out")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert config_of(tmp_path / "out")["torch_dtype"] == "bfloat16"


def test_infinity_that_was_there_is_no_reason() -> None:
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0])
    assert cast("x", values, torch.float16)[0] == torch.inf
    assert cast("x", values, None) is values


def test_one_group_has_no_order() -> None:
    """An order says which inputs share a scale: with one group for all, compressed-tensors refuses to read of one."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(64, 32, bias=False)
    perm = torch.randperm(64, generator=generator)
    options = {"bits": 4, "sym": True}
    for group_size in (-1, 16):
        settings = QuantSettings(Method.RTN, group_size=group_size, **options)
        grid = find_grid(linear.weight.data[:, perm], settings)
        index = group_index(64, settings, perm.device)
        record = pack(
            grid.per_weight(index).codes(linear.weight.data[:, perm]), grid, settings, method="gptq", perm=perm
        )
        scheme = scheme_of([LinearTraits.of("x", record)], "compressed-tensors")
        assert isinstance(scheme, ExportScheme)
        assert scheme.has_order == (group_size == 16)
        tensors = linear_tensors("x", record, scheme)
        assert ("x.weight_g_idx" in tensors) == (group_size == 16)
        assert np.array_equal(compressed_weight(tensors, "x", 4), dequantize(record).numpy())


def test_nothing_to_convert(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    with pytest.raises(CheckpointError, match="no linear to write as awq; quantize it"):
        convert(model, tmp_path / "out", "awq")
    assert not list(tmp_path.glob("out*"))


def test_bits_that_differ(tmp_path: Path) -> None:
    """Two reasons, each said once with the modules that it holds for."""
    model = tiny_folder(tmp_path / "model")
    run(model, tmp_path / "eight", method="rtn", bits=8, format="gptq")
    with pytest.raises(CheckpointError, match=r"q_proj, .* and 11 more: it has 8 bits, and awq has 4") as caught:
        convert(tmp_path / "eight", tmp_path / "out", "awq")
    assert str(caught.value).count("8 bits") == 1


def test_a_section_of_the_card_is_in_the_manifest(tmp_path: Path) -> None:
    convert(FIXTURES / "llama-awq-g64", tmp_path / "out", "gptq")
    add_section(tmp_path / "out", "## Quality\n\ngood")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.index("## Quality") < card.index("qengine serve")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    assert manifest["README.md"]["sha256"] == digests(tmp_path / "out")["README.md"]
    assert not list((tmp_path / "out").glob("*.new"))


# Killed


def _convert(model: Path, out: Path) -> None:
    torch.set_num_threads(1)
    convert(model, out, "gptq", max_shard_bytes=2**15)


def test_killed_anywhere_it_leaves_nothing_under_the_name_and_can_begin_again(tmp_path: Path) -> None:
    model = tmp_path / "awq"
    run(tiny_folder(tmp_path / "model"), model, method="rtn", format="awq")
    before = digests(model)
    clean = tmp_path / "clean" / "out"
    count = run_until(_convert, (model, clean), clean.parent, None)
    assert count is not None
    expected = digests(clean)
    assert sum(name.endswith(".safetensors") for name in expected) > 1
    places = sorted(random.Random(0).sample(range(1, count + 1), 8))
    for place in places:
        out = tmp_path / f"killed-{place}" / "out"
        assert run_until(_convert, (model, out), out.parent, place) is None
        if not out.exists():
            partial = out.with_name("out.partial")
            if partial.exists():
                with pytest.raises(CheckpointError):
                    open_checkpoint(partial)
            assert run_until(_convert, (model, out), out.parent, None) is not None
        assert digests(out) == expected
        assert [file.name for file in out.parent.iterdir()] == ["out"]
    assert digests(model) == before


# GGUF


@pytest.mark.parametrize("format", ["awq", "gptq", "compressed-tensors", "dense"])
def test_gguf_of_four_bits(tmp_path: Path, format: ExportFormat) -> None:
    model = gguf_model(tmp_path / "model.gguf", Kind.Q4_0)
    convert(model, tmp_path / "out", format)
    one, other = weights_of(model), weights_of(tmp_path / "out")
    for name, weight in one.items():
        exact = format != "dense" and "proj" in name
        assert torch.equal(other[name], weight if exact else weight.half().float()), name
    config = config_of(tmp_path / "out")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"]


def test_gguf_with_minima_is_refused_but_for_dense(tmp_path: Path) -> None:
    model = gguf_model(tmp_path / "model.gguf", Kind.Q4_1)
    with pytest.raises(CheckpointError, match="minimum in place of a zero point"):
        convert(model, tmp_path / "out", "awq")
    convert(model, tmp_path / "out", "dense")
    assert len([slot for slot in tensors_of(tmp_path / "out") if "proj" in slot]) == 7


def test_gguf_with_llama3_rope(tmp_path: Path) -> None:
    """The file has the divisors alone; the config that is written gives the same ones."""
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
    scaled = rotary(config).inv_freq
    plain = 1 / 500000.0 ** (torch.arange(0, 16, 2).double() / 16)
    factors = (plain / scaled).float().numpy()
    assert factors.max() == pytest.approx(8)
    path = gguf_model(tmp_path / "plain.gguf", Kind.Q4_0)
    source = open_checkpoint(path)
    raw = {**source.config, "rope_freq_factors": [float(factor) for factor in factors]}
    opened = OpenedModel.check(source)
    skeleton = type(opened.skeleton)(raw, str(path))
    assert torch.allclose(skeleton.rotary(torch.device("cpu")).inv_freq, scaled, rtol=1e-5)
    written = skeleton.exported_config(raw, str(path))
    assert "rope_freq_factors" not in written
    again = type(skeleton)(written, str(path))
    assert torch.allclose(again.rotary(torch.device("cpu")).inv_freq, scaled, rtol=1e-4)
    odd = type(skeleton)({**raw, "rope_freq_factors": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]}, str(path))
    with pytest.raises(CheckpointError, match=r"not Llama 3\.1's"):
        odd.exported_config(raw, str(path))


def test_linear_slots_are_found(tmp_path: Path) -> None:
    opened = OpenedModel.check(open_checkpoint(tiny_folder(tmp_path)))
    assert sum(isinstance(slot, LinearSlot) for slot in opened.skeleton.slots(tied=opened.tied)) == 15
