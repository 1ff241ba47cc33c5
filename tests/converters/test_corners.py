"""What is rare and still decides whether a model runs: guesses, stray tensors, costly patterns, unusual metadata."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from converters.gguf_file import BLOCK_TYPES
from converters.open import open_checkpoint
from converters.source import LinearSlot, TensorSlot
from tests.converters.folders import (
    MODULE,
    assert_equal,
    awq_config,
    gptq_config,
    open_checked,
    read_packed,
    refusal,
    slot_of,
    write_folder,
)
from tests.converters.gguf_files import write_gguf
from tests.converters.reference import awq_tensors, gptq_tensors, random_linear

NORM = TensorSlot("model.norm.weight", (32,))


# Declarations


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_without_a_declaration_the_shapes_tell(tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str) -> None:
    linear = random_linear(64, 32, 32, symmetric=True)
    tensors = gptq_tensors(MODULE, linear) if method == "gptq" else awq_tensors(MODULE, linear)
    write_folder(tmp_path, tensors)
    with caplog.at_level(logging.WARNING):
        assert open_checkpoint(tmp_path).quantization == method
    assert method.upper() in caplog.text
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)


def test_shapes_of_neither_method_are_refused(tmp_path: Path) -> None:
    """Words [out, in / 8], as AWQ's GEMV version has them."""
    tensors = {
        f"{MODULE}.qweight": torch.zeros(32, 8, dtype=torch.int32),
        f"{MODULE}.scales": torch.ones(32, 16).half(),
    }
    assert "neither GPTQ nor AWQ" in refusal(write_folder(tmp_path, tensors))


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale_inv", "weight.absmax", "SCB", "B", "scaled_zeros"])
def test_tensors_of_other_methods_are_recognized(tmp_path: Path, suffix: str) -> None:
    message = refusal(write_folder(tmp_path, {f"{MODULE}.{suffix}": torch.zeros(4)}))
    assert "not supported" in message
    assert f"{MODULE}.{suffix}" in message


def test_overrides_of_auto_round_by_exact_name(tmp_path: Path) -> None:
    """96 rows in two groups are 64 + 32 or 48 + 48: the entry for this very module decides."""
    linear = random_linear(96, 32, 48)
    others = {MODULE + "_2": {"group_size": 64}, "model": {"group_size": 64}, "lm_head": {"bits": 16}}
    config = gptq_config(4, 64, quant_method="auto-round", packing_format="auto_round:auto_gptq")
    write_folder(
        tmp_path, gptq_tensors(MODULE, linear), {**config, "extra_config": {**others, MODULE: {"group_size": 48}}}
    )
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        *((costly, "costly") for costly in ("(a+)+$", "(.*)*x", ".*" * 50 + "x", ".?" * 50 + "x", "(x?){30}")),
        ("a" * 300, "at most 256"),
    ],
)
def test_patterns_that_could_match_for_ever_are_refused(tmp_path: Path, pattern: str, reason: str) -> None:
    linear = random_linear(64, 32, 32)
    write_folder(tmp_path, gptq_tensors(MODULE, linear), gptq_config(4, 32, dynamic={pattern: {"bits": 4}}))
    assert reason in refusal(tmp_path, [slot_of(linear)])


def test_patterns_of_real_checkpoints_are_accepted(tmp_path: Path) -> None:
    linear = random_linear(64, 32, 32)
    rules = {r"+:.*\.18\..*(gate|up).*": {"bits": 8}, r"-:model\.layers\.(?:1[5-9]|[2-4]\d)\..*": {}}
    write_folder(tmp_path, gptq_tensors(MODULE, linear), gptq_config(4, 32, dynamic=rules))
    assert_equal(read_packed(tmp_path, slot_of(linear)), linear.weight)


@pytest.mark.parametrize(("said", "meant"), [("gptq", "v2"), ("gptq_v2", "v1")])
def test_zero_points_that_are_one_step_off_are_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, said: str, meant: str
) -> None:
    names = [MODULE, "model.layers.1.mlp.down_proj"]
    linears = {name: random_linear(128, 64, 32, seed=seed) for seed, name in enumerate(names)}
    tensors = {key: value for name in names for key, value in gptq_tensors(name, linears[name], meant).items()}
    write_folder(tmp_path, tensors, gptq_config(4, 32, checkpoint_format=said))
    slots = [slot_of(linears[name], name) for name in names]
    source = open_checked(tmp_path, slots)
    with caplog.at_level(logging.WARNING):
        for slot in slots:
            source.read_linear(slot)
    assert len(caplog.records) == 1
    assert "steps off" in caplog.text


def test_an_awq_file_that_lost_its_zero_points(tmp_path: Path) -> None:
    linear = random_linear(64, 32, 32)
    tensors = awq_tensors(MODULE, linear)
    del tensors[f"{MODULE}.qzeros"]
    write_folder(tmp_path, tensors, awq_config(32, zero_point=True))
    assert f"{MODULE}.qzeros" in refusal(tmp_path, [slot_of(linear)])


# Tensors nobody asks for


@pytest.mark.parametrize(
    ("name", "tensor", "ignored"),
    [
        ("model.layers.0.self_attn.bias", torch.ones(1, 1, 4, 4), True),
        ("model.layers.0.self_attn.bias", torch.ones(4), False),
        ("model.layers.0.self_attn.rotary_emb.cos_cached", torch.ones(4, 4), True),
        ("model.norm.bias", torch.zeros(32), True),
        ("model.norm.bias", torch.ones(32), False),
        ("lm_head.weight", torch.ones(8, 32), True),
        ("model.layers.0.mlp.act.scales", torch.ones(8), False),
    ],
)
def test_tensors_that_no_slot_uses(tmp_path: Path, name: str, tensor: torch.Tensor, ignored: bool) -> None:
    write_folder(tmp_path, {NORM.name: torch.ones(32), name: tensor})
    if ignored:
        open_checked(tmp_path, [NORM])
    else:
        assert name in refusal(tmp_path, [NORM])


# GGUF


F32_ROW = (np.ones(32, np.float32), Kind.F32)


def test_block_types_are_those_of_the_package() -> None:
    known = {kind.value: (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    # ggml made the two fields of Q8_1 halves; the package still counts them as floats. No file has it.
    assert BLOCK_TYPES[Kind.Q8_1].block_bytes == 36
    ours = {kind: (block.name, block.block_len, block.block_bytes) for kind, block in BLOCK_TYPES.items()}
    shared = (known.keys() & ours.keys()) - {Kind.Q8_1}
    assert {kind: ours[kind] for kind in shared} == {kind: known[kind] for kind in shared}
    assert {Kind.Q4_K, Kind.Q6_K, Kind.IQ4_NL, Kind.MXFP4} <= shared


def test_the_first_bytes_tell_not_the_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"output_norm.weight": F32_ROW})
    blob = path.rename(tmp_path / "sha256-0123abcd")
    assert open_checked(blob, [NORM]).quantization == "gguf"


def test_a_projector_beside_the_model_is_not_a_model(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {"output_norm.weight": F32_ROW})
    write_gguf(tmp_path / "mmproj-m.gguf", {"v.patch_embd.weight": F32_ROW})
    open_checked(tmp_path, [NORM])


def test_a_head_of_its_own_may_be_left_over_when_tied(tmp_path: Path) -> None:
    tensors = {"output_norm.weight": F32_ROW, "output.weight": (np.ones((4, 32), np.float32), Kind.F32)}
    open_checked(write_gguf(tmp_path / "m.gguf", tensors), [NORM])
    more = {**tensors, "blk.1.attn_norm.weight": F32_ROW}
    assert "blk.1.attn_norm.weight" in refusal(write_gguf(tmp_path / "n.gguf", more), [NORM])


def test_a_type_that_cannot_be_read_is_named_with_those_that_can(tmp_path: Path) -> None:
    tensors = {"blk.0.ffn_down.weight": (np.zeros((2, 144), np.uint8), Kind.Q4_K)}
    message = refusal(write_gguf(tmp_path / "m.gguf", tensors), [LinearSlot(MODULE, 256, 2)])
    for part in ("blk.0.ffn_down.weight", "Q4_K", "Q4_0", "Q8_0", "BF16"):
        assert part in message


@pytest.mark.parametrize(
    ("arch", "more", "expected"),
    [
        ("llama", {}, {"sliding_window": None, "rope_scaling": None, "head_dim": 16, "torch_dtype": "float32"}),
        (
            "llama",
            {"llama.attention.sliding_window": 4096},
            {"architectures": ["MistralForCausalLM"], "sliding_window": 4096},
        ),
        ("mistral", {}, {"architectures": ["MistralForCausalLM"], "sliding_window": None}),
        (
            "qwen2",
            {"qwen2.rope.scaling.type": "linear", "qwen2.rope.scaling.factor": 4.0},
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": None}},
        ),
        ("llama", {"llama.rope.scale_linear": 2.0}, {"rope_theta": 500000.0}),
        ("llama", {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0}, {"rope_scaling": None}),
        ("qwen3", {"qwen3.attention.key_length": 32}, {"head_dim": 32, "architectures": ["Qwen3ForCausalLM"]}),
        ("llama", {"tokenizer.ggml.eos_token_id": 7}, {"eos_token_id": 7, "bos_token_id": None}),
    ],
)
def test_configurations(tmp_path: Path, arch: str, more: dict[str, Any], expected: dict[str, Any]) -> None:
    tensors = {"token_embd.weight": (np.ones((40, 64), np.float32), Kind.F32)}
    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, arch, more=more)).config
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("arch", "more", "reason"),
    [
        ("gpt2", {}, "gpt2.*llama"),
        ("llama", {"llama.expert_count": 8}, "mixture of experts"),
        ("llama", {"llama.rope.dimension_count": 8}, r"rope\.dimension_count"),
        ("llama", {"llama.attention.value_length": 8}, r"attention\.value_length"),
        ("llama", {"llama.attention.key_length": "sixteen"}, r"attention\.key_length"),
        ("llama", {"tokenizer.ggml.eos_token_id": "two"}, "eos_token_id"),
    ],
)
def test_metadata_that_cannot_be_followed(tmp_path: Path, arch: str, more: dict[str, Any], reason: str) -> None:
    message = refusal(write_gguf(tmp_path / "m.gguf", {"output_norm.weight": F32_ROW}, arch, more=more))
    assert re.search(reason, message)
