"""Words computed by hand from the formats' descriptions, read through the front door.

A layer of these examples has 16 inputs, GPTQ files at least 32: the rows are written twice.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from converters.source import LinearSlot
from tests.converters.folders import MODULE, awq_config, gptq_config, natural, read_linear, read_packed, write_folder
from tests.converters.gguf_files import write_gguf
from tests.converters.reference import awq_pack, half_split, pack

#: Q[k, n] = (3k + 5n + 1) mod 16, two groups of eight rows.
CODES = (3 * np.arange(16)[:, None] + 5 * np.arange(8) + 1) % 16
ZEROS = np.array([[8, 7, 6, 5, 9, 10, 11, 4], [1, 2, 3, 12, 13, 14, 15, 8]])
SCALES = (np.array([[1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1]]) / 16).astype(np.float16)
ROW_0 = [-0.4375, -0.125, 0.9375, -1.25, -1.25, 0, 1.75, 0]
ROW_8 = [4, 5.25, 0, -1.25, 0, -2.25, -1, 0.25]


def words(*values: int) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.uint32).view(np.int32))


@pytest.mark.parametrize(
    ("layout", "zero_words"),
    [("gptq", [0x3A984567, 0x7EDCB210]), ("gptq_v2", [0x4BA95678, 0x8FEDC321])],
)
def test_gptq(tmp_path: Path, layout: str, zero_words: list[int]) -> None:
    qweight = pack(CODES.T, 4).T
    assert qweight.view(np.uint32)[0, :2].tolist() == [0x630DA741, 0xB852FC96]
    assert qweight.view(np.uint32)[1, 0] == 0xEB852FC9
    tensors = {
        f"{MODULE}.qweight": torch.from_numpy(np.tile(qweight, (2, 1))),
        f"{MODULE}.qzeros": words(*zero_words, *zero_words).view(4, 1),
        f"{MODULE}.scales": torch.from_numpy(np.tile(SCALES, (2, 1))),
    }
    write_folder(tmp_path, tensors, gptq_config(group_size=8, checkpoint_format=layout))
    weight = natural(read_packed(tmp_path, LinearSlot(MODULE, 32, 8)))
    assert weight[0].tolist() == weight[16].tolist() == ROW_0
    assert weight[8].tolist() == weight[24].tolist() == ROW_8


def test_awq(tmp_path: Path) -> None:
    qweight = awq_pack(CODES)
    assert qweight.view(np.uint32)[[0, 8], 0].tolist() == [0x4A06F5B1, 0xC28E7D39]
    tensors = {
        f"{MODULE}.qweight": torch.from_numpy(qweight),
        f"{MODULE}.qzeros": words(0x4A57B968, 0x8EC2FD31).view(2, 1),
        f"{MODULE}.scales": torch.from_numpy(SCALES),
    }
    write_folder(tmp_path, tensors, awq_config(group_size=8))
    weight = natural(read_packed(tmp_path, LinearSlot(MODULE, 16, 8)))
    assert weight[0].tolist() == ROW_0
    assert weight[8].tolist() == ROW_8


def test_the_order_inside_an_awq_word(tmp_path: Path) -> None:
    tensors = {
        f"{MODULE}.qweight": words(*[0x75316420] * 32).view(32, 1),
        f"{MODULE}.qzeros": words(0).view(1, 1),
        f"{MODULE}.scales": torch.ones(1, 8, dtype=torch.float16),
    }
    write_folder(tmp_path, tensors, awq_config(group_size=32))
    weight = natural(read_packed(tmp_path, LinearSlot(MODULE, 32, 8)))
    assert weight[0].tolist() == weight[31].tolist() == list(range(8))


def column_of_codes(bits: int, column: list[int]) -> dict[str, torch.Tensor]:
    """A layer of 32 outputs whose weights are its codes: scale 1, zero point 0."""
    return {
        f"{MODULE}.qweight": words(*column).view(-1, 1).repeat(1, 32),
        f"{MODULE}.qzeros": torch.zeros(1, bits, dtype=torch.int32),
        f"{MODULE}.scales": torch.ones(1, 32, dtype=torch.float16),
        f"{MODULE}.g_idx": torch.zeros(32, dtype=torch.int32),
    }


@pytest.mark.parametrize(
    ("bits", "column", "codes"),
    [
        pytest.param(2, [0xE4E4E4E4] * 2, [0, 1, 2, 3] * 8, id="2 bits"),
        pytest.param(3, [0x98ABC398, 0xC398ABC3, 0xABC398AB], [3 * i % 8 for i in range(32)], id="3-bit stream"),
        pytest.param(4, [0x76543210] * 4, [*range(8)] * 4, id="4 bits"),
        pytest.param(8, [0xC8030201] * 8, [1, 2, 3, 200] * 8, id="8 bits"),
    ],
)
def test_gptq_words_of_every_width(tmp_path: Path, bits: int, column: list[int], codes: list[int]) -> None:
    write_folder(tmp_path, column_of_codes(bits, column), gptq_config(bits, -1, checkpoint_format="gptq_v2"))
    weight = natural(read_packed(tmp_path, LinearSlot(MODULE, 32, 32)))
    assert weight[:, 0].tolist() == weight[:, 31].tolist() == codes


@pytest.mark.parametrize(
    ("bits", "v1", "v2"),
    [
        (2, [0x55555555] * 2, [0xAAAAAAAA] * 2),
        (3, [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D], [0x24924924, 0x49249249, 0x92492492]),
        (4, [0x77777777] * 4, [0x88888888] * 4),
        (8, [0x7F7F7F7F] * 8, [0x80808080] * 8),
    ],
)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_constant_zero_words(
    tmp_path: Path, bits: int, v1: list[int], v2: list[int], symmetric: bool, layout: str
) -> None:
    tensors = column_of_codes(bits, [0] * bits)
    tensors[f"{MODULE}.qzeros"] = words(*(v2 if layout == "gptq_v2" else v1)).view(1, -1)
    write_folder(tmp_path, tensors, gptq_config(bits, -1, checkpoint_format=layout, sym=symmetric))
    weight = natural(read_packed(tmp_path, LinearSlot(MODULE, 32, 32)))
    assert np.unique(weight).tolist() == [-(2.0 ** (bits - 1))]


@pytest.mark.parametrize(
    ("word", "writer", "zeros"),
    [
        pytest.param(0x1F2876F4, None, [5, 0, 7, 8, 9, 3, 0, 2], id="each field less one, wrapping"),
        pytest.param(0x0F2875F4, "gptqmodel:5.4.2", [5, 0, 7, 8, 9, 3, 0, 2], id="the word less one, borrowing"),
        pytest.param(0x0F2875F4, None, [5, 0, 6, 8, 9, 3, 0, 1], id="borrowed, but not said who wrote it"),
        pytest.param(0xFFFFFFF4, None, [5, 0, 0, 0, 0, 0, 0, 0], id="AutoGPTQ's -1, which destroys what follows"),
    ],
)
def test_zero_points_of_zero_in_v1(tmp_path: Path, word: int, writer: str | None, zeros: list[int]) -> None:
    meta = {"quantizer": [writer]} if writer else {}
    tensors = {
        f"{MODULE}.qweight": torch.zeros(4, 8, dtype=torch.int32),
        f"{MODULE}.qzeros": words(word).view(1, 1),
        f"{MODULE}.scales": torch.ones(1, 8, dtype=torch.float16),
    }
    write_folder(tmp_path, tensors, gptq_config(4, -1, meta=meta))
    weight = natural(read_packed(tmp_path, LinearSlot(MODULE, 32, 8)))
    assert (-weight[0]).tolist() == zeros


QS = bytes.fromhex("00112233445566778899aabbccddeeff")


@pytest.mark.parametrize(
    ("kind", "block"),
    [
        (GGMLQuantizationType.Q4_0, bytes.fromhex("0038") + QS),
        (GGMLQuantizationType.Q4_1, bytes.fromhex("003800c4") + QS),
    ],
    ids=["Q4_0", "Q4_1"],
)
def test_gguf_blocks(tmp_path: Path, kind: GGMLQuantizationType, block: bytes) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_down.weight": (np.frombuffer(block, np.uint8)[None], kind)})
    weight = natural(read_packed(path, LinearSlot(MODULE, 32, 1)))
    assert weight[:, 0].tolist() == [0.5 * (i % 16) - 4 for i in range(32)]


def test_rows_in_rope_order(tmp_path: Path) -> None:
    stored = [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    rows = np.repeat(np.array(stored, np.float32)[:, None], 32, axis=1)
    assert half_split(rows, 2)[:, 0].tolist() == list(range(16))
    tensors = {"blk.0.attn_q.weight": (rows, GGMLQuantizationType.F32)}
    path = write_gguf(tmp_path / "m.gguf", tensors, heads=2, kv_heads=2, more={"llama.attention.key_length": 8})
    weight = read_linear(path, LinearSlot("model.layers.0.self_attn.q_proj", 32, 16))
    assert natural(weight)[0].tolist() == list(range(16))
