"""Checkpoints that other programs wrote: every tensor, bit by bit, against an independent reading of the same bytes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from converters.open import open_checkpoint
from converters.source import LinearSlot, Slot, TensorSlot
from quant_kernels.packed_weight import DenseWeight, PackedWeight
from tests.converters.folders import assert_equal
from tests.converters.reference import Floats, awq_weight, gptq_weight

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())


def raw_tensors(name: str) -> dict[str, torch.Tensor]:
    (file,) = (FIXTURES / name).glob("*.safetensors")
    tensors: dict[str, torch.Tensor] = load_file(file)
    return tensors


def expected_weight(tensors: dict[str, torch.Tensor], module: str, config: dict[str, Any]) -> Floats:
    qweight, qzeros, scales = (tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales"))
    if config["quant_method"] == "awq":
        return awq_weight(qweight, qzeros, scales)
    convention = "v2" if config.get("checkpoint_format") == "gptq_v2" else "v1"
    return gptq_weight(qweight, qzeros, scales, tensors[f"{module}.g_idx"], config["bits"], convention)


def decoder_slots(config: dict[str, Any]) -> list[Slot]:
    """What a Llama or Qwen2 decoder asks for, by its config.json."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q_size, kv_size = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    biased = config["model_type"] == "qwen2"
    slots: list[Slot] = [
        TensorSlot("model.embed_tokens.weight", (vocab, hidden)),
        TensorSlot("model.norm.weight", (hidden,)),
    ]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        slots += [
            TensorSlot(prefix + "input_layernorm.weight", (hidden,)),
            TensorSlot(prefix + "post_attention_layernorm.weight", (hidden,)),
            LinearSlot(prefix + "self_attn.q_proj", hidden, q_size, biased),
            LinearSlot(prefix + "self_attn.k_proj", hidden, kv_size, biased),
            LinearSlot(prefix + "self_attn.v_proj", hidden, kv_size, biased),
            LinearSlot(prefix + "self_attn.o_proj", q_size, hidden),
            LinearSlot(prefix + "mlp.gate_proj", hidden, inner),
            LinearSlot(prefix + "mlp.up_proj", hidden, inner),
            LinearSlot(prefix + "mlp.down_proj", inner, hidden),
        ]
    return slots if config["tie_word_embeddings"] else [*slots, LinearSlot("lm_head", hidden, vocab)]


def test_all_six_are_here() -> None:
    assert len(NAMES) == 6


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_read_exactly(name: str, caplog: pytest.LogCaptureFixture) -> None:
    tensors = raw_tensors(name)
    config = json.loads((FIXTURES / name / "config.json").read_text())
    quantization = config["quantization_config"]
    source = open_checkpoint(FIXTURES / name)
    assert source.has_linear("lm_head") != config["tie_word_embeddings"]
    slots = decoder_slots(config)
    with caplog.at_level(logging.WARNING):
        source.check(slots)
        for slot in slots:
            if isinstance(slot, TensorSlot):
                assert torch.equal(source.read_tensor(slot), tensors[slot.name])
                continue
            weight = source.read_linear(slot)
            if f"{slot.name}.qweight" not in tensors:
                assert isinstance(weight, DenseWeight)
                assert torch.equal(weight.weight, tensors[f"{slot.name}.weight"])
                continue
            assert isinstance(weight, PackedWeight)
            assert_equal(weight, expected_weight(tensors, slot.name, quantization))
            assert weight.scales.dtype == tensors[f"{slot.name}.scales"].dtype
            assert (weight.bias is not None) == slot.has_bias
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "quantization", "description"),
    [
        ("llama-gptq-sym-g128", "gptq", "GPTQ 4-bit, group 128, symmetric"),
        ("llama-gptq-actorder-g32", "gptq", "GPTQ 4-bit, group 32, symmetric, act-order"),
        ("qwen2-gptq-v2-g64", "gptq", "GPTQ v2 4-bit, group 64, asymmetric"),
        ("llama-autogptq-perchannel", "gptq", "GPTQ 4-bit, per channel, symmetric"),
        ("llama-awq-g64", "awq", "AWQ 4-bit, group 64, asymmetric"),
        ("llama-autoawq-g128", "awq", "AWQ 4-bit, group 128, asymmetric"),
    ],
)
def test_descriptions(name: str, quantization: str, description: str) -> None:
    source = open_checkpoint(FIXTURES / name)
    assert (source.quantization, source.description) == (quantization, description)


def test_activation_order_becomes_a_permutation() -> None:
    name = "llama-gptq-actorder-g32"
    stored = raw_tensors(name)["model.layers.0.mlp.down_proj.g_idx"].long()
    weight = open_checkpoint(FIXTURES / name).read_linear(LinearSlot("model.layers.0.mlp.down_proj", 512, 256))
    assert isinstance(weight, PackedWeight)
    assert weight.perm is not None
    assert torch.equal(stored[weight.perm.long()], torch.arange(512) // 32)


def test_codes_of_plain_gptq_are_the_words_of_the_file() -> None:
    name = "llama-gptq-sym-g128"
    weight = open_checkpoint(FIXTURES / name).read_linear(LinearSlot("model.layers.1.mlp.up_proj", 256, 512))
    assert isinstance(weight, PackedWeight)
    assert torch.equal(weight.codes, raw_tensors(name)["model.layers.1.mlp.up_proj.qweight"])
    assert (weight.zero_const, weight.zeros, weight.perm, weight.group_size) == (8, None, None, 128)


def test_a_tied_head_is_read_from_the_embedding() -> None:
    source = open_checkpoint(FIXTURES / "qwen2-gptq-v2-g64")
    head = source.read_linear(LinearSlot("model.embed_tokens", 256, 2048))
    assert isinstance(head, DenseWeight)
    assert torch.equal(head.weight, raw_tensors("qwen2-gptq-v2-g64")["model.embed_tokens.weight"])
