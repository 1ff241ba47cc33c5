"""Broken, hostile and unsuitable GGUF files: each is refused with a message that names the file."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from converters.errors import CheckpointError
from converters.open import open_checkpoint
from converters.source import LinearSlot, Slot, TensorSlot
from tests.converters.folders import MODULE, refusal
from tests.converters.gguf_files import (
    ARRAY,
    BOOL,
    F32,
    STRING,
    U8,
    U32,
    U64,
    RawGGUF,
    array_pair,
    pair,
    string_pair,
    tensor_info,
    text,
    u32_pair,
    write_gguf,
)
from tests.converters.reading import outcome, read_everything

HUGE = 2**40
NORM: list[Slot] = [TensorSlot("model.layers.0.input_layernorm.weight", (32,))]

#: What every supported architecture states.
HYPER_PARAMETERS = (
    u32_pair("llama.block_count", 1),
    u32_pair("llama.context_length", 64),
    u32_pair("llama.embedding_length", 32),
    u32_pair("llama.feed_forward_length", 64),
    u32_pair("llama.attention.head_count", 2),
    u32_pair("llama.attention.head_count_kv", 1),
    pair("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)),
    u32_pair("llama.vocab_size", 16),
)
SOUND = RawGGUF().plus(*HYPER_PARAMETERS)
ONE = tensor_info("blk.0.attn_norm.weight")


def second(name: str = "b", offset: int = 128) -> RawGGUF:
    """With another tensor of the same size."""
    return replace(SOUND, infos=(ONE, tensor_info(name, offset=offset)), data=bytes(256))


def with_info(info: bytes) -> RawGGUF:
    return replace(SOUND, infos=(info,))


NAME = "blk.0.attn_norm.weight"
BAD_FILES: dict[str, RawGGUF] = {
    "another magic": replace(SOUND, magic=b"GGML"),
    "version 1": replace(SOUND, version=1),
    "version 4": replace(SOUND, version=4),
    "big endian": replace(SOUND, version=3 << 24),
    # Counts and lengths
    "2**40 tensors": replace(SOUND, num_tensors=HUGE),
    "2**64 - 1 tensors": replace(SOUND, num_tensors=2**64 - 1),
    "2**40 pairs": replace(SOUND, num_pairs=HUGE),
    "a tensor more than there are": replace(SOUND, num_tensors=2),
    "a pair more than there are": replace(SOUND, num_pairs=len(SOUND.pairs) + 1),
    "a key of 2**40 bytes": SOUND.plus(text(b"k", HUGE) + struct.pack("<I", STRING) + text("v")),
    "a key of 2**64 - 1 bytes": SOUND.plus(text(b"k", 2**64 - 1) + struct.pack("<I", STRING) + text("v")),
    "a value of 2**40 bytes": SOUND.plus(pair("k", STRING, text(b"v", HUGE))),
    "a value of 2**64 - 1 bytes": SOUND.plus(pair("k", STRING, text(b"v", 2**64 - 1))),
    "a tensor name of 2**40 bytes": with_info(text(b"n", HUGE) + ONE[8:]),
    "an array of 2**40 numbers": SOUND.plus(array_pair("k", U32, HUGE)),
    "an array of 2**40 bytes": SOUND.plus(array_pair("k", U8, HUGE)),
    "an array of 2**64 - 1 numbers": SOUND.plus(array_pair("k", U32, 2**64 - 1)),
    "an array of 2**40 strings": SOUND.plus(array_pair("k", STRING, HUGE)),
    "an array of a long string": SOUND.plus(array_pair("k", STRING, 1, text(b"v", HUGE))),
    "a million pairs of a tiny file": replace(SOUND, num_pairs=10**6),
    # Values
    "an array of arrays": SOUND.plus(array_pair("k", ARRAY, 1, struct.pack("<IQ", U32, 0))),
    "an array of an unknown type": SOUND.plus(array_pair("k", 13, 1, bytes(8))),
    "a value of an unknown type": SOUND.plus(pair("k", 13, bytes(8))),
    "a key that is not UTF-8": SOUND.plus(pair(b"\xff\xfe", U32, bytes(4))),
    "a value that is not UTF-8": SOUND.plus(pair("k", STRING, text(b"\xff\xfe"))),
    "a string of an array that is not UTF-8": SOUND.plus(array_pair("k", STRING, 1, text(b"\xc3"))),
    "a tensor name that is not UTF-8": with_info(tensor_info(b"\xff")),
    "a key twice": SOUND.plus(u32_pair("k", 1), u32_pair("k", 1)),
    "a tensor twice": second(NAME),
    # Placement
    "an alignment of 0": SOUND.plus(u32_pair("general.alignment", 0)),
    "an alignment of 3": SOUND.plus(u32_pair("general.alignment", 3)),
    "an alignment of 24": SOUND.plus(u32_pair("general.alignment", 24)),
    "an alignment of 2**31": SOUND.plus(u32_pair("general.alignment", 2**31)),
    "an alignment in words": SOUND.plus(string_pair("general.alignment", "32")),
    "an alignment of an array": SOUND.plus(array_pair("general.alignment", U32, 1, struct.pack("<I", 32))),
    "an offset that is not aligned": second(offset=130),
    "an offset aligned to 32 where 64 is said": second(offset=160).plus(u32_pair("general.alignment", 64)),
    "tensors that overlap": second(offset=96),
    "tensors on the same bytes": second(offset=0),
    "an offset outside the file": second(offset=256),
    "an offset of 2**63": second(offset=2**63),
    "an offset that wraps": second(offset=2**64 - 32),
    "a tensor that ends outside the file": replace(SOUND, data=bytes(127)),
    # Types and dimensions
    "ggml type 4, which is gone": with_info(tensor_info(NAME, kind=4)),
    "ggml type 99": with_info(tensor_info(NAME, kind=99)),
    "ggml type 2**32 - 1": with_info(tensor_info(NAME, kind=2**32 - 1)),
    "no dimensions": with_info(tensor_info(NAME, dims=())),
    "five dimensions": with_info(tensor_info(NAME, dims=(32, 1, 1, 1, 1))),
    "2**32 - 1 dimensions": with_info(tensor_info(NAME, num_dims=2**32 - 1)),
    "a dimension of 0": with_info(tensor_info(NAME, dims=(32, 0))),
    "a row of no values": with_info(tensor_info(NAME, dims=(0,))),
    "half a block": with_info(tensor_info(NAME, dims=(48,), kind=2)),
    "a block spread over rows": with_info(tensor_info(NAME, dims=(16, 2), kind=2)),
    "dimensions whose product wraps": with_info(tensor_info(NAME, dims=(2**32, 2**32))),
    "dimensions of 2**62 each": with_info(tensor_info(NAME, dims=(2**62,) * 4)),
    # Architecture
    "no architecture": replace(SOUND, pairs=HYPER_PARAMETERS),
    "an unknown architecture": replace(SOUND, pairs=(string_pair("general.architecture", "gpt9"), *HYPER_PARAMETERS)),
    "an architecture that is a number": replace(SOUND, pairs=(u32_pair("general.architecture", 1), *HYPER_PARAMETERS)),
    "an architecture that is an array": replace(
        SOUND, pairs=(array_pair("general.architecture", STRING, 1, text("llama")), *HYPER_PARAMETERS)
    ),
}


def write(folder: Path, content: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(content)
    return path


def test_the_sound_file_that_the_others_vary(tmp_path: Path) -> None:
    read_everything(write(tmp_path, SOUND.to_bytes()), NORM)
    read_everything(write(tmp_path, replace(SOUND, version=2).to_bytes()), NORM)
    aligned = replace(SOUND.plus(u32_pair("general.alignment", 64)), alignment=64)
    read_everything(write(tmp_path, aligned.to_bytes()), NORM)


@pytest.mark.parametrize("file", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(tmp_path: Path, file: RawGGUF) -> None:
    message = refusal(write(tmp_path, file.to_bytes()), NORM)
    assert "model.gguf" in message
    assert len(message) < 2000


@pytest.mark.parametrize("size", [0, 3, 4, 7, 8, 20, 30, 100])
def test_a_file_cut_short(tmp_path: Path, size: int) -> None:
    assert "model.gguf" in refusal(write(tmp_path, SOUND.to_bytes()[:size]), NORM)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    content = SOUND.to_bytes()
    for size in range(len(content)):
        with pytest.raises(CheckpointError):
            read_everything(write(tmp_path, content[:size]), NORM)


#: Values of every type that a key may wrongly have.
ODD_VALUES = {
    "nothing": (U32, struct.pack("<I", 0)),
    "three": (U32, struct.pack("<I", 3)),
    "2**32 - 1": (U32, struct.pack("<I", 2**32 - 1)),
    "2**63": (U64, struct.pack("<Q", 2**63)),
    "minus one": (5, struct.pack("<i", -1)),
    "a fraction": (F32, struct.pack("<f", 2.5)),
    "NaN": (F32, struct.pack("<f", float("nan"))),
    "infinity": (F32, struct.pack("<f", float("inf"))),
    "a truth value": (BOOL, b"\1"),
    "a string": (STRING, text("two")),
    "an empty array": (ARRAY, struct.pack("<IQ", U32, 0)),
    "an array of equals": (ARRAY, struct.pack("<IQII", U32, 2, 2, 2)),
    "an array of others": (ARRAY, struct.pack("<IQII", U32, 2, 1, 2)),
    "an array of strings": (ARRAY, struct.pack("<IQ", STRING, 1) + text("x")),
}
KEYS = (
    *(f"llama.{key}" for key in ("block_count", "context_length", "embedding_length", "feed_forward_length")),
    *(f"llama.attention.{key}" for key in ("head_count", "head_count_kv", "key_length", "value_length")),
    "llama.attention.layer_norm_rms_epsilon",
    "llama.attention.sliding_window",
    *(f"llama.rope.{key}" for key in ("freq_base", "dimension_count", "scale_linear")),
    *(f"llama.rope.scaling.{key}" for key in ("type", "factor", "original_context_length")),
    "llama.vocab_size",
    "llama.expert_count",
    "general.architecture",
    "general.alignment",
    *(f"split.{key}" for key in ("no", "count", "tensors.count")),
    *(f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos")),
)


@pytest.mark.parametrize("key", KEYS)
def test_odd_metadata(tmp_path: Path, key: str) -> None:
    """Whether it is refused here or where the configuration is read, nothing but the one error may come out."""
    slots: list[Slot] = [LinearSlot("model.layers.0.self_attn.q_proj", 32, 32)]
    kept = [old for old in SOUND.pairs if not old.startswith(text(key))]
    sound = replace(SOUND, infos=(tensor_info("blk.0.attn_q.weight", (32, 32)),), data=bytes(4096))
    assert outcome(write(tmp_path, sound.to_bytes()), slots) is None
    for kind, value in ODD_VALUES.values():
        file = replace(sound, pairs=(*kept, pair(key, kind, value)))
        message = outcome(write(tmp_path, file.to_bytes()), slots)
        assert message is None or "model.gguf" in message


def test_rope_factors_of_a_block_type(tmp_path: Path) -> None:
    factors = np.zeros((1, 18), np.uint8)
    path = write_gguf(tmp_path / "model.gguf", {"rope_freqs.weight": (factors, GGMLQuantizationType.Q4_0)})
    assert "rope_freqs.weight" in refusal(path)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS", "MXFP4"])
def test_types_without_a_reader_are_named(tmp_path: Path, kind: str) -> None:
    block_len, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    data = np.zeros((4, block_bytes), np.uint8)
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_down.weight": (data, GGMLQuantizationType[kind])})
    source = open_checkpoint(path)
    with pytest.raises(CheckpointError) as caught:
        source.check([LinearSlot(MODULE, block_len, 4)])
    assert kind in str(caught.value)
    assert "Q4_0" in str(caught.value), "what is supported"


def test_all_problems_come_in_one_error(tmp_path: Path) -> None:
    values = np.ones((32, 32), np.float32)
    tensors = {
        "blk.0.ffn_down.weight": (values, GGMLQuantizationType.F32),
        "blk.0.extra.weight": (values, GGMLQuantizationType.F32),
    }
    slots: list[Slot] = [LinearSlot(MODULE, 64, 32), *NORM]
    message = refusal(write_gguf(tmp_path / "m.gguf", tensors), slots)
    for part in ("blk.0.ffn_down.weight", "blk.0.extra.weight", "blk.0.attn_norm.weight", "64", "32"):
        assert part in message


def test_a_request_that_disagrees(tmp_path: Path) -> None:
    path = write(tmp_path, SOUND.to_bytes())
    assert open_checkpoint(path, "gguf").quantization == "gguf"
    with pytest.raises(CheckpointError, match=r"(?s)GGUF.*awq"):
        open_checkpoint(path, "awq")


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    content = SOUND.to_bytes()
    path = write(tmp_path, content)
    source = open_checkpoint(path)
    os.truncate(path, len(content) - 64)
    with pytest.raises(CheckpointError, match=r"model\.gguf"):
        source.read_tensor(TensorSlot("model.layers.0.input_layernorm.weight", (32,)))


def test_a_folder_whose_model_is_a_link_out_of_it(tmp_path: Path) -> None:
    """Whoever wrote the folder does not choose which of the user's files is opened; a user who names a link does."""
    (tmp_path / "folder").mkdir()
    path = write(tmp_path, SOUND.to_bytes())
    link = tmp_path / "folder" / "model.gguf"
    link.symlink_to(path)
    assert "outside the folder" in refusal(link.parent, NORM)
    read_everything(link, NORM)


@pytest.mark.parametrize("head_dim", [0, 2**14 + 2, 2**31 - 2])
def test_head_sizes_that_are_none(tmp_path: Path, head_dim: int) -> None:
    pairs = [u32_pair(f"llama.{key}", head_dim) for key in ("attention.key_length", "rope.dimension_count")]
    infos = (ONE, tensor_info("rope_freqs.weight", (max(1, head_dim // 2),), offset=128))
    file = replace(SOUND.plus(*pairs), infos=infos, data=bytes(256))
    assert "model.gguf" in refusal(write(tmp_path, file.to_bytes()), NORM)
