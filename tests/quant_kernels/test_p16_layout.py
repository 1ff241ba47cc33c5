"""P16 is lossless both ways, its bits are where the documentation says, and packing needs little memory."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quant_kernels.linear.p16 import layout
from quant_kernels.linear.p16.layout import can_pack, pack, unpack
from quant_kernels.packed_weight import PackedWeight
from quant_kernels.packing import unpack_codes
from quant_kernels.scheme import ZeroKind
from tests.quant_kernels.records import KINDS, random_record

CPU = torch.device("cpu")
SHAPES = [(128, 16, 32), (256, 33, 128), (96, 40, 96), (704, 130, 64), (192, 16, 192), (160, 24, 64), (384, 256, 96)]
FIELDS = ("codes", "scales", "zeros", "mins", "codebook", "perm", "bias")


def assert_same(got: PackedWeight, expected: PackedWeight) -> None:
    for name in FIELDS:
        mine, theirs = getattr(got, name), getattr(expected, name)
        assert (mine is None) == (theirs is None), name
        assert mine is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs)), name
    for name in ("bits", "group_size", "in_features", "out_features", "zero_const", "origin"):
        assert getattr(got, name) == getattr(expected, name), name


@pytest.mark.parametrize(("in_features", "out_features", "group_size"), SHAPES)
@pytest.mark.parametrize("kind", [*KINDS, "codebook"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_round_trip(
    in_features: int, out_features: int, group_size: int, kind: str, bits: int, dtype: torch.dtype
) -> None:
    for scale_dtype in (torch.float16, torch.bfloat16):
        record = random_record(
            *(in_features, out_features, group_size), kind=kind, bits=bits, bias=True, act_order=True,
            scale_dtype=scale_dtype,
        )  # fmt: skip
        if bits == 8 and kind in ("mins", "codebook"):
            assert "8-bit" in can_pack(record, dtype)[1]
            continue
        assert_same(unpack(pack(record, dtype, CPU)), record)


@pytest.mark.parametrize("zero", [0, 7, 8, 16])
def test_constant_zero_points_come_back(zero: int) -> None:
    record = replace(random_record(128, 16, 32, kind="const"), zero_const=zero)
    assert_same(unpack(pack(record, torch.float16, CPU)), record)


def test_float32_scales_pack_where_a_short_type_holds_them() -> None:
    record = random_record(128, 16, 32, kind="mins", scale_dtype=torch.float32)
    assert "no 16-bit type" in can_pack(record, torch.float16)[1]
    with pytest.raises(ValueError, match="cannot pack"):
        pack(record, torch.float16, CPU)
    assert record.mins is not None
    short = replace(record, scales=record.scales.half().float(), mins=record.mins.half().float())
    assert_same(unpack(pack(short, torch.float16, CPU)), short)


def test_mins_that_the_scales_type_does_not_hold() -> None:
    record = random_record(128, 16, 32, kind="mins")
    assert record.mins is not None
    large = replace(record, mins=torch.full_like(record.mins.float(), 98304.0))
    assert not can_pack(large, torch.float16)[0]
    fits = replace(large, scales=torch.ones_like(record.scales).float())
    assert pack(fits, torch.float16, CPU).scheme.scale_dtype == torch.bfloat16
    assert_same(unpack(pack(fits, torch.float16, CPU)), fits)
    mixed = replace(record, mins=torch.ones_like(record.mins).bfloat16())
    assert_same(unpack(pack(mixed, torch.float16, CPU)), mixed)


def test_bits_are_where_the_diagram_says() -> None:
    record = random_record(256, 16, 128)
    codes = unpack_codes(record.codes, 4)
    words = pack(record, torch.float16, CPU).words.to(torch.int32)
    for block, row, plane in [(0, 0, 0), (0, 31, 3), (1, 5, 2), (1, 31, 1)]:
        assert torch.equal((words[32 * block + row, :16] >> (4 * plane)) & 15, codes[128 * block + 32 * plane + row])
    record = random_record(128, 16, 128, bits=8)
    codes = unpack_codes(record.codes, 8)
    words = pack(record, torch.float16, CPU).words.to(torch.int32)
    for block, row, plane in [(0, 0, 0), (0, 31, 1), (1, 7, 0)]:
        assert torch.equal((words[32 * block + row, :16] >> (8 * plane)) & 255, codes[64 * block + 32 * plane + row])


def test_groups_of_a_block_share_a_word_of_the_table() -> None:
    record = random_record(256, 16, 32)
    packed = pack(record, torch.float16, CPU)
    assert packed.scales.dtype == torch.int64
    assert packed.scales.shape == (3, 128)
    for group in range(8):
        field = (packed.scales[group // 4, :16] >> (16 * (group % 4))).to(torch.int16).view(torch.float16)
        assert torch.equal(field, record.scales[group])
    assert pack(random_record(256, 16, 64), torch.float16, CPU).scales.dtype == torch.int32
    assert pack(random_record(256, 16, 128), torch.float16, CPU).scales.dtype == torch.float16


@pytest.mark.parametrize(
    ("group_size", "bits", "expected"),
    [(32, 4, 32), (64, 4, 64), (128, 4, 128), (256, 4, 128), (96, 4, 32), (384, 4, 0), (32, 8, 32), (128, 8, 128)],
)
def test_groups_that_kernels_see(group_size: int, bits: int, expected: int) -> None:
    record = random_record(384, 16, group_size, bits=bits)
    assert layout.scheme_of(record, torch.float16).group_size == expected


def test_padding_is_zero_and_the_tables_end_with_zeros() -> None:
    packed = pack(random_record(160, 24, 32, kind="mins"), torch.float16, CPU)
    assert packed.words.shape == (64, 128)
    assert not packed.words[:, 24:].any()
    assert not packed.scales[:, 24:].any()
    assert not packed.scales[-1].any()
    assert packed.offsets is not None
    assert not packed.offsets[-1].any()


def test_what_cannot_be_packed_says_why() -> None:
    assert "float32" in can_pack(random_record(64, 16, 32), torch.float32)[1]
    assert "group size 48" in can_pack(random_record(96, 16, 48), torch.float16)[1]
    assert can_pack(random_record(72, 16, 72, kind="const"), torch.float16) == (True, "")


def test_zero_kinds() -> None:
    kinds = [layout.zero_kind(random_record(64, 16, 32, kind=kind)) for kind in (*KINDS, "codebook")]
    assert kinds == [ZeroKind.CONST, ZeroKind.INTEGER, ZeroKind.MIN, ZeroKind.CODEBOOK]


def test_slices_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    record = random_record(256, 900, 64)
    sliced = pack(record, torch.float16, CPU)
    monkeypatch.setattr(layout, "_SLICES", 1)
    whole = pack(record, torch.float16, CPU)
    assert torch.equal(whole.words, sliced.words)
    assert_same(unpack(sliced), record)


class _Meter(TorchDispatchMode):
    """Bytes of the storages that operations have made and that still live, and the most there were.

    What was there before, the record itself, does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._seen.update(a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor))
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


@pytest.mark.parametrize(
    ("columns", "group", "kind"), [(4096, 128, "zeros"), (1024, 128, "const"), (4096, 32, "zeros")]
)
def test_packing_and_unpacking_need_less_than_the_layer_again(columns: int, group: int, kind: str) -> None:
    record = random_record(1024, columns, group, kind=kind)
    with _Meter() as meter:
        packed = pack(record, torch.float16, CPU)
    assert meter.most > packed.num_bytes  # The meter sees the result itself.
    assert meter.most - packed.num_bytes < packed.num_bytes
    with _Meter() as meter:
        back = unpack(packed)
    assert meter.most > back.num_bytes
    assert meter.most - back.num_bytes < back.num_bytes
