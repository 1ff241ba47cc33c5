"""Broken, hostile and unsuitable folders: each is refused with a message that names what was found.

The numbers C1 to C20 of the comments count the kinds of bad checkpoints in the order of the threat list.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.errors import CheckpointError
from converters.open import open_checkpoint
from converters.source import LinearSlot, Slot, TensorSlot
from tests.converters.folders import (
    MODULE,
    awq_config,
    gptq_config,
    open_checked,
    refusal,
    slot_of,
    write_folder,
    write_json,
)
from tests.converters.reading import read_everything
from tests.converters.reference import awq_tensors, gptq_tensors, random_linear

NORM = "model.norm.weight"
FILE = "model.safetensors"
LINEAR = random_linear(64, 32, 32)
SLOTS: list[Slot] = [slot_of(LINEAR), TensorSlot(NORM, (8,))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound GPTQ folder of one linear and one norm."""
    path = tmp_path / "model"
    tensors = {**gptq_tensors(MODULE, LINEAR), NORM: torch.ones(8)}
    write_folder(path, tensors, gptq_config(group_size=32))
    read_everything(path, SLOTS)
    return path


# Headers


def raw_file(header: bytes | Mapping[str, Any], data: bytes = b"", declared: int | None = None) -> bytes:
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(body) if declared is None else declared) + body + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    as_lists = [list(v) if isinstance(v, tuple) else v for v in (shape, offsets)]
    return {"dtype": dtype, "shape": as_lists[0], "data_offsets": as_lists[1]}


BAD_FILES: dict[str, bytes] = {
    # C1
    "an empty file": b"",
    "seven bytes": bytes(7),
    "a length and nothing else": struct.pack("<Q", 100),
    # C2
    "a header of 2**63 bytes": raw_file(b"{}", declared=2**63),
    "a header of 2**64 - 1 bytes": raw_file(b"{}", declared=2**64 - 1),
    "a header over the limit": raw_file(b"{}", declared=100_000_001),
    "a header longer than the file": raw_file(b"{}", declared=3),
    # C3
    "no header": raw_file(b""),
    "a header that is not UTF-8": raw_file(b'{"\xff\xfe": 1}'),
    "a header that is not JSON": raw_file(b"{norm}"),
    "a header cut short": raw_file(b'{"a": {"dtype": "F32"'),
    "a header that is an array": raw_file(b"[]"),
    "a header that is a number": raw_file(b"1"),
    "a header that begins with a space": raw_file(b" {}"),
    "a header nested 100,000 deep": raw_file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "metadata that are no strings": raw_file({"__metadata__": {"a": 1}}),
    "metadata that are a list": raw_file({"__metadata__": []}),
    "a name twice": raw_file(
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
        b' "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        bytes(8),
    ),
    "a tensor that is a number": raw_file({"a": 1}),
    "a tensor without a shape": raw_file({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "an unknown dtype": raw_file({"a": entry("F33")}, bytes(8)),
    "a dtype that is a number": raw_file({"a": entry(32)}, bytes(8)),
    "a dtype that is a list": raw_file({"a": entry(["F32"])}, bytes(8)),
    "a shape that is a number": raw_file({"a": entry(shape=2)}, bytes(8)),
    "a shape with a fraction": raw_file({"a": entry(shape=[2.0])}, bytes(8)),
    "a shape with a truth value": raw_file({"a": entry(shape=[True, 2])}, bytes(8)),
    "a negative shape": raw_file({"a": entry(shape=[-2])}, bytes(8)),
    "a shape with a string": raw_file({"a": entry(shape=["2"])}, bytes(8)),
    # C5
    "offsets that overlap": raw_file({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "offsets with a hole": raw_file({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    "a hole at the start": raw_file({"a": entry(offsets=(4, 12))}, bytes(12)),
    "offsets beyond the file": raw_file({"a": entry()}, bytes(7)),
    "offsets of 2**63": raw_file({"a": entry(offsets=(2**63, 2**63 + 8))}, bytes(8)),
    "offsets of 2**100": raw_file({"a": entry(offsets=(2**100, 2**100 + 8))}, bytes(8)),
    "offsets reversed": raw_file({"a": entry(offsets=(8, 0))}, bytes(8)),
    "negative offsets": raw_file({"a": entry(offsets=(-8, 0))}, bytes(8)),
    "three offsets": raw_file({"a": entry(offsets=(0, 4, 8))}, bytes(8)),
    "offsets that are fractions": raw_file({"a": entry(offsets=[0.0, 8.0])}, bytes(8)),
    "bytes after the last tensor": raw_file({"a": entry()}, bytes(9)),
    "two tensors on the same bytes": raw_file({"a": entry(), "b": entry()}, bytes(8)),
    # C6
    "a shape that needs more bytes": raw_file({"a": entry(shape=(3,))}, bytes(8)),
    "a shape that needs fewer bytes": raw_file({"a": entry(shape=(1,))}, bytes(8)),
    "a shape whose product overflows": raw_file({"a": entry(shape=(2**63, 2**63))}, bytes(8)),
    "a shape whose product is 2**64": raw_file({"a": entry(shape=(2**32, 2**32), offsets=(0, 0))}),
    "half a byte": raw_file({"a": entry("F4", (1,), (0, 0))}),
    "a thousand dimensions": raw_file({"a": entry(shape=[1] * 1000, offsets=(0, 4))}, bytes(4)),
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_headers(folder: Path, content: bytes) -> None:
    (folder / FILE).write_bytes(content)
    assert FILE in refusal(folder, SLOTS)


def test_names_in_messages_are_printable_and_short(folder: Path) -> None:
    name = "\x1b[31m\n" + "n" * 5000
    (folder / FILE).write_bytes(raw_file({name: entry("F33")}, bytes(8)))
    message = refusal(folder)
    assert "\x1b" not in message
    assert len(message) < 1000


# Shards


def shard(folder: Path, map_to: Callable[[str, str], str] = lambda _, place: place) -> tuple[Path, Path]:
    """Cut the folder's file into two shards; `map_to` may write something else into the index."""
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    files = (folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
    save_file({NORM: tensors.pop(NORM)}, files[0])
    save_file(tensors, files[1])
    places = {NORM: files[0].name, **dict.fromkeys(tensors, files[1].name)}
    index = {"weight_map": {name: map_to(name, place) for name, place in places.items()}}
    write_json(folder / f"{FILE}.index.json", index)
    return files


def test_sound_shards_load(folder: Path) -> None:
    shard(folder)
    read_everything(folder, SLOTS)


@pytest.mark.parametrize("kept", [0.5, None], ids=["half", "all but a byte"])
@pytest.mark.parametrize("which", [0, 1])
def test_truncated_shards_are_named(folder: Path, which: int, kept: float | None) -> None:  # C7
    files = shard(folder)
    size = files[which].stat().st_size
    os.truncate(files[which], size - 1 if kept is None else int(size * kept))
    assert files[which].name in refusal(folder, SLOTS)


@pytest.mark.parametrize("which", [0, 1])
def test_missing_shards_are_named(folder: Path, which: int) -> None:  # C10
    files = shard(folder)
    files[which].unlink()
    assert files[which].name in refusal(folder, SLOTS)


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "../../x", "sub/inside.safetensors", "", ".", "..", "a\0b", "./model.safetensors"],
)
def test_shards_outside_the_folder_are_refused(folder: Path, name: str) -> None:  # C10
    outside = folder.parent / "outside.safetensors"
    (folder / "sub").mkdir()
    save_file({NORM: torch.ones(8)}, outside)
    save_file({NORM: torch.ones(8)}, folder / "sub" / "inside.safetensors")
    shard(folder, lambda tensor, place: name if tensor == NORM else place)
    assert "index.json" in refusal(folder, SLOTS)


def test_absolute_shard_names_are_refused(folder: Path) -> None:  # C10
    outside = folder.parent / "outside.safetensors"
    save_file({NORM: torch.ones(8)}, outside)
    shard(folder, lambda tensor, place: str(outside) if tensor == NORM else place)
    assert "index.json" in refusal(folder, SLOTS)


def test_links_out_of_the_folder_are_refused(folder: Path) -> None:  # C10
    files = shard(folder)
    outside = files[0].rename(folder.parent / "outside.safetensors")
    files[0].symlink_to(outside)
    assert files[0].name in refusal(folder, SLOTS)


def test_weights_that_are_a_link_out_of_the_folder_are_refused(folder: Path) -> None:  # C10
    outside = (folder / FILE).rename(folder.parent / "outside.safetensors")
    (folder / FILE).symlink_to(outside)
    assert "outside the folder" in refusal(folder, SLOTS)
    (folder / FILE).unlink()
    (folder / FILE).symlink_to(outside.rename(folder / "other.name"))
    read_everything(folder, SLOTS)


def test_links_of_the_hub_cache_are_followed(folder: Path) -> None:
    """huggingface_hub keeps the files under blobs/ and links to them from snapshots/<revision>/."""
    shard(folder)
    repository = folder.parent / "models--owner--name"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(repository / "blobs" / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    read_everything(snapshot, SLOTS)


def test_a_tensor_the_shard_lacks(folder: Path) -> None:  # C11
    files = shard(folder, lambda _, __: "model-00002-of-00002.safetensors")
    message = refusal(folder, SLOTS)
    assert NORM in message
    assert files[1].name in message


def test_a_tensor_in_two_shards(folder: Path) -> None:  # C11
    files = shard(folder)
    save_file({**load_file(files[1]), NORM: torch.zeros(8)}, files[1])
    assert NORM in refusal(folder, SLOTS)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": null}}', "{"]
)
def test_bad_indexes(folder: Path, content: str) -> None:
    shard(folder)
    (folder / f"{FILE}.index.json").write_text(content)
    assert "index.json" in refusal(folder, SLOTS)


def test_several_files_without_an_index(folder: Path) -> None:
    files = shard(folder)
    (folder / f"{FILE}.index.json").unlink()
    message = refusal(folder, SLOTS)
    assert files[0].name in message
    assert "index" in message


# What does not fit the model


def test_all_problems_come_in_one_error(folder: Path) -> None:  # C12
    slots: list[Slot] = [
        slot_of(LINEAR),
        TensorSlot("model.layers.7.input_layernorm.weight", (8,)),
        LinearSlot("model.layers.7.mlp.up_proj", 64, 32),
        TensorSlot(NORM, (9,)),
    ]
    tensors = load_file(folder / FILE)
    save_file({**tensors, "model.extra.weight": torch.ones(3)}, folder / FILE)
    message = refusal(folder, slots)
    for part in ("model.layers.7.input_layernorm.weight", "model.layers.7.mlp.up_proj", NORM, "model.extra.weight"):
        assert part in message
    assert "8" in message, "the shape that was found"
    assert "9" in message, "the shape that was expected"


def test_a_long_list_of_problems_is_cut(folder: Path) -> None:
    slots: list[Slot] = [TensorSlot(f"model.layers.{i}.input_layernorm.weight", (8,)) for i in range(5000)]
    message = refusal(folder, slots)
    assert len(message) < 10_000
    assert "more" in message


@pytest.mark.parametrize("part", ["scales", "qzeros", "qweight"])
def test_incomplete_linears(folder: Path, part: str) -> None:  # C12
    tensors = load_file(folder / FILE)
    del tensors[f"{MODULE}.{part}"]
    save_file(tensors, folder / FILE)
    assert f"{MODULE}.{part}" in refusal(folder, SLOTS) or part == "qweight"


def test_leftover_tensors_are_refused(folder: Path) -> None:  # C12
    assert f"{MODULE}.qweight" in refusal(folder, SLOTS[1:])
    assert NORM in refusal(folder, SLOTS[:1])


def test_buffers_of_older_writers_are_ignored(folder: Path) -> None:  # C12
    stray = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.masked_bias": torch.tensor(-1e9),
        "model.layers.0.mlp.act_fn.bias": torch.zeros(8),
    }
    save_file({**load_file(folder / FILE), **stray}, folder / FILE)
    read_everything(folder, SLOTS)


def test_a_leftover_bias_that_is_not_zero_is_refused(folder: Path) -> None:
    save_file({**load_file(folder / FILE), "model.norm.bias": torch.ones(8)}, folder / FILE)
    assert "model.norm.bias" in refusal(folder, SLOTS)


Change = Callable[[torch.Tensor], torch.Tensor]
MISFITS: dict[str, tuple[str, Change]] = {
    "qweight of floats": ("qweight", lambda t: t.float()),
    "qweight of int64": ("qweight", lambda t: t.long()),
    "qweight of one dimension": ("qweight", lambda t: t.flatten()),
    "qweight of three dimensions": ("qweight", lambda t: t[None]),
    "a row less": ("qweight", lambda t: t[:-1]),
    "a column less": ("qweight", lambda t: t[:, :-1]),
    "5 bits": ("qweight", lambda t: torch.zeros(10, 32, dtype=torch.int32)),
    "no rows": ("qweight", lambda t: t[:0]),
    "scales of integers": ("scales", lambda t: t.int()),
    "scales of one dimension": ("scales", lambda t: t[0]),
    "a column of scales less": ("scales", lambda t: t[:, :-1]),
    "groups that fit no size": ("scales", lambda t: torch.ones(7, 32).half()),
    "no groups": ("scales", lambda t: t[:0]),
    "more groups than rows": ("scales", lambda t: torch.ones(65, 32).half()),
    "qzeros of bytes": ("qzeros", lambda t: t.to(torch.uint8)),
    "qzeros for every row": ("qzeros", lambda t: t.repeat(32, 1)),
    "a column of qzeros less": ("qzeros", lambda t: t[:, :-1]),
    "g_idx of floats": ("g_idx", lambda t: t.float()),
    "a short g_idx": ("g_idx", lambda t: t[:-1]),
    "a square g_idx": ("g_idx", lambda t: t.view(8, 8)),
    "a short bias": ("bias", lambda t: t[:-1]),
    "a bias of integers": ("bias", lambda t: t.int()),
}


@pytest.mark.parametrize(("part", "change"), MISFITS.values(), ids=MISFITS)
def test_misfits(folder: Path, part: str, change: Change) -> None:  # C13
    tensors = {**load_file(folder / FILE), f"{MODULE}.bias": torch.ones(32).half()}
    tensors[f"{MODULE}.{part}"] = change(tensors[f"{MODULE}.{part}"]).contiguous()
    save_file(tensors, folder / FILE)
    source = open_checkpoint(folder)
    with pytest.raises(CheckpointError) as caught:
        source.check(SLOTS)
    assert MODULE in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_scales_must_be_finite(tmp_path: Path, method: str, value: float) -> None:  # C15
    scales = LINEAR.scales.clone()
    scales[1, 5] = value
    tensors = gptq_tensors(MODULE, LINEAR) if method == "gptq" else awq_tensors(MODULE, LINEAR)
    config = gptq_config(group_size=32) if method == "gptq" else awq_config(32)
    write_folder(tmp_path, {**tensors, f"{MODULE}.scales": scales}, config)
    assert f"{MODULE}.scales" in refusal(tmp_path, SLOTS[:1])


def test_negative_zero_is_a_scale(folder: Path) -> None:  # C15
    tensors = load_file(folder / FILE)
    tensors[f"{MODULE}.scales"][0, 0] = -0.0
    save_file(tensors, folder / FILE)
    read_everything(folder, SLOTS)


def test_a_file_that_changes_while_it_is_read(folder: Path) -> None:
    source = open_checked(folder, SLOTS)
    size = (folder / FILE).stat().st_size
    os.truncate(folder / FILE, size // 2)
    with pytest.raises(CheckpointError, match=FILE):
        source.read_linear(slot_of(LINEAR))


# Configurations


@pytest.mark.parametrize(
    "values",
    [
        {"group_size": 0},
        {"group_size": -2},
        {"group_size": "many"},
        {"group_size": 32.5},
        {"group_size": [32]},
        {"bits": 1},
        {"bits": 5},
        {"bits": 16},
        {"bits": -4},
        {"bits": "four"},
        {"bits": 4.5},
        {"bits": True},
        {"sym": "yes"},
        {"sym": 2},
        {"desc_act": []},
        {"dynamic": []},
        {"dynamic": {"(": {}}},
        {"dynamic": {".*": {"bits": 5}}},
        {"dynamic": {".*": {"group_size": 0}}},
    ],
    ids=str,
)
def test_bad_values(folder: Path, values: dict[str, Any]) -> None:  # C13
    config = {"model_type": "llama", "quantization_config": {**gptq_config(group_size=32), **values}}
    write_json(folder / "config.json", config)
    message = refusal(folder, SLOTS)
    assert next(iter(values)) in message or "dynamic" in message


@pytest.mark.parametrize("pattern", [".?" * 100 + "x", "a?" * 60 + "b", "(.?.?.?)" * 20 + "x"])
def test_patterns_of_many_options_are_refused(folder: Path, pattern: str) -> None:
    """Every question mark doubles the ways to match; they must be refused before anything is matched."""
    config = {"model_type": "llama", "quantization_config": gptq_config(dynamic={pattern: {}})}
    write_json(folder / "config.json", config)
    with pytest.raises(CheckpointError, match="dynamic"):
        open_checkpoint(folder)


@pytest.mark.parametrize("declared", ["gptq", 4, ["gptq"], True])
def test_a_declaration_that_is_no_object(folder: Path, declared: object) -> None:
    write_json(folder / "config.json", {"quantization_config": declared})
    assert "quantization_config" in refusal(folder, SLOTS)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe{}", b'{"a": ' + b"[" * 100_000, b"{'a': 1}"],
    ids=["empty", "cut", "array", "null", "string", "not UTF-8", "nested", "Python"],
)
@pytest.mark.parametrize("name", ["config.json", "quantize_config.json"])
def test_bad_json_files(folder: Path, name: str, content: bytes) -> None:  # C17
    write_json(folder / "config.json", {"model_type": "llama"})
    (folder / name).write_bytes(content)
    assert name in refusal(folder, SLOTS)


def test_a_config_of_100_megabytes_is_not_read(folder: Path) -> None:  # C17
    os.truncate(folder / "config.json", 100 * 2**20)
    assert "config.json" in refusal(folder, SLOTS)


def test_without_a_config(folder: Path) -> None:  # C17
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder, SLOTS)


def test_a_config_that_is_a_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert "config.json" in refusal(folder, SLOTS)


# Methods and layouts that are not supported


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    "compressed-tensors of floats": (
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        "compressed-tensors",
    ),
    "fp8": ({"quant_method": "fp8", "fmt": "e4m3"}, "fp8"),
    "mxfp4": ({"quant_method": "mxfp4"}, "mxfp4"),
    "hqq": ({"quant_method": "hqq"}, "hqq"),
    "torchao": ({"quant_method": "torchao"}, "torchao"),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt"),
    "marlin": ({"quant_method": "marlin", "bits": 4}, "marlin"),
    "a method that is a number": ({"quant_method": 7}, "quant_method|7"),
    "a method that is a list": ({"quant_method": ["gptq"]}, "quant_method|gptq"),
    "GPTQ for Marlin": (gptq_config(checkpoint_format="marlin"), "marlin"),
    "GPTQ for Marlin, as it was spelled": (gptq_config(is_marlin_format=True), "marlin"),
    "GPTQ for BitBLAS": (gptq_config(checkpoint_format="bitblas"), "bitblas"),
    "planar GPTQ": (gptq_config(checkpoint_format="gptq_p"), "gptq_p"),
    "GPTQ in wider words": (gptq_config(pack_dtype="int64"), "int64"),
    "GPTQ of 5 bits": (gptq_config(bits=5), "5"),
    "AWQ GEMV": (awq_config(version="gemv"), "gemv"),
    "fast AWQ GEMV": (awq_config(version="GEMV_FAST"), "gemv_fast"),
    "AWQ for Marlin": (awq_config(version="marlin"), "marlin"),
    "AWQ of llm-awq": (awq_config(backend="llm-awq"), "llm-awq"),
    "AWQ of 8 bits": ({**awq_config(), "bits": 8}, "8"),
    "auto-round's own packing": (gptq_config(quant_method="auto-round", packing_format="auto_round"), "auto_?round"),
    "auto-round's GPTQ with its zeros": (
        gptq_config(quant_method="auto-round", packing_format="auto_round:gptq:exllamav2"),
        "auto_round:gptq",
    ),
}


@pytest.mark.parametrize(("config", "reason"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_quantizations(folder: Path, config: dict[str, Any], reason: str) -> None:
    write_json(folder / "config.json", {"model_type": "llama", "quantization_config": config})
    with pytest.raises(CheckpointError, match=f"(?i){reason}") as caught:
        open_checkpoint(folder)
    assert "support" in str(caught.value) or "expected" in str(caught.value), "what would be accepted"


def test_a_quantized_config_without_quantized_tensors(folder: Path) -> None:
    save_file({NORM: torch.ones(8)}, folder / FILE)
    assert "qweight" in refusal(folder, SLOTS[1:])


# What was asked for


@pytest.mark.parametrize("asked", ["gptq", "gptq_marlin"])
def test_the_right_request(folder: Path, asked: str) -> None:
    assert open_checkpoint(folder, asked).quantization == "gptq"


@pytest.mark.parametrize("asked", ["awq", "awq_marlin", "gguf"])
def test_a_request_that_disagrees(folder: Path, asked: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, asked)
    assert asked in str(caught.value)
    assert "GPTQ" in str(caught.value)


def test_a_request_for_a_plain_folder(tmp_path: Path) -> None:
    write_folder(tmp_path, {NORM: torch.ones(8)})
    with pytest.raises(CheckpointError, match=r"not quantized.*awq"):
        open_checkpoint(tmp_path, "awq")


def test_a_request_nobody_knows(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"squeezellm.*(awq|gptq)"):
        open_checkpoint(folder, "squeezellm")


# Paths


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_with_a_way_out(tmp_path: Path, name: str) -> None:  # C20
    """Loading this pickle would create a file; it must not even be opened."""
    trap = tmp_path / "executed"
    command = f"touch {trap}".encode()
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'" + command + b"'\ntR.")
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    for path in (tmp_path, tmp_path / name):
        message = refusal(path, SLOTS)
        assert name in message
        assert "safetensors" in message or "save_pretrained" in message
    assert not trap.exists()


def test_an_unfinished_export(folder: Path) -> None:
    unfinished = folder.rename(folder.with_name("model.partial"))
    assert "not finished" in refusal(unfinished, SLOTS)
    for spelling in (f"{unfinished}/", unfinished / "."):
        assert "not finished" in refusal(Path(spelling), SLOTS)


@pytest.mark.parametrize("kind", ["missing", "empty folder", "text file", "dangling link", "config alone"])
def test_paths_that_are_no_checkpoint(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "thing"
    if kind in ("empty folder", "config alone"):
        path.mkdir()
    if kind == "config alone":
        write_json(path / "config.json", {"model_type": "llama"})
    if kind == "text file":
        path.write_text("hello")
    if kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    assert "thing" in refusal(path, SLOTS)


def test_a_name_that_no_file_can_have() -> None:
    for name in ("a\0b", "x" * 5000, ""):
        with pytest.raises(CheckpointError):
            open_checkpoint(name)


def test_a_pipe_in_the_place_of_weights(folder: Path) -> None:
    """Opening one would wait for ever."""
    (folder / FILE).unlink()
    os.mkfifo(folder / FILE)
    assert FILE in refusal(folder, SLOTS)
