"""All layers in one call, against the same decoder written in torch over whole sequences, without a cache.

The reference rounds what the kernels round: activations to int8 before each matmul, keys and values to bfloat16. Its
other sums differ in order, which now and then moves a number across a rounding boundary: then one input differs by a
step of 1 / 127 of its chunk's largest. So results agree to a few tenths of a percent, and never by luck to none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from quant_kernels import stack_check
from quant_kernels.attention.kv_format import LayerCache, plain
from quant_kernels.footprint import native_stack_room
from quant_kernels.linear.cpu_int8 import CpuInt8Linear
from quant_kernels.native.binding import Library, load
from quant_kernels.native.structures import Level, Stack
from quant_kernels.ops.base import Heads
from quant_kernels.packed_weight import PackedWeight
from quant_kernels.reference import dequantize
from quant_kernels.stack import LayerStack, NativeInputs, StackLayer, can_stack
from tests.quant_kernels.records import make_cache, random_record, rounded_row

LIBRARY, REASON = load()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=REASON)
EPS = 1e-5
POSITIONS = 640


@dataclass(frozen=True)
class Shape:
    """A small decoder."""

    hidden: int = 64
    intermediate: int = 96
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    windows: tuple[int | None, ...] = (None, None)
    head_norms: bool = False
    bias: bool = False
    order: bool = False
    down_order: bool = False
    kind: str = "mins"
    group: int = 32
    block_size: int = 4


SHAPES = {
    "plain": Shape(),
    "one head each": Shape(num_heads=2, head_dim=64, intermediate=160, kind="const"),
    "narrow heads": Shape(num_heads=12, num_kv_heads=4, head_dim=8),
    "wide heads": Shape(hidden=96, num_heads=2, num_kv_heads=1, head_dim=80, block_size=16),
    "windows": Shape(windows=(5, None, 37)),
    "windows beyond 32 bits": Shape(windows=(2**32 + 5, None)),
    "normed heads": Shape(head_norms=True, kind="zeros"),
    "biases": Shape(bias=True),
    "activation order": Shape(order=True, kind="zeros"),
    "activation order of down": Shape(down_order=True, kind="zeros"),
    "larger groups": Shape(hidden=128, num_heads=8, intermediate=256, group=128, kind="zeros"),
    "many heads on one key": Shape(num_heads=32, num_kv_heads=1, head_dim=8, block_size=1),
}


@dataclass(frozen=True)
class Model:
    """Records, norms, and the stack made of them."""

    shape: Shape
    records: list[tuple[PackedWeight, PackedWeight, PackedWeight, PackedWeight]]
    norms: list[tuple[torch.Tensor, torch.Tensor]]
    heads: list[Heads]
    final_norm: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def of(cls, shape: Shape) -> Model:
        rng = torch.Generator().manual_seed(1)
        attended = shape.num_heads * shape.head_dim
        qkv = attended + 2 * shape.num_kv_heads * shape.head_dim
        sizes = ((shape.hidden, qkv), (attended, shape.hidden), (shape.hidden, 2 * shape.intermediate))
        sizes = (*sizes, (shape.intermediate, shape.hidden))
        records, norms, heads = [], [], []
        for number, window in enumerate(shape.windows):
            made = [
                random_record(k, n, shape.group, kind=shape.kind, seed=4 * number + i, bias=shape.bias, act_order=order)
                for i, ((k, n), order) in enumerate(zip(sizes, (shape.order,) * 3 + (shape.down_order,), strict=True))
            ]
            records.append(tuple(made))
            norms.append(tuple(torch.rand(2, shape.hidden, generator=rng) + 0.5))
            head_norms = torch.rand(2, shape.head_dim, generator=rng) + 0.5 if shape.head_norms else None
            heads.append(
                Heads(shape.num_heads, shape.num_kv_heads, shape.head_dim, window, norms=head_norms, norm_eps=1e-6)
            )
        angles = torch.outer(torch.arange(POSITIONS).float(), 100.0 ** -torch.linspace(0, 1, shape.head_dim // 2))
        final = torch.rand(shape.hidden, generator=rng) + 0.5
        return cls(shape, records, norms, heads, final, angles.cos(), angles.sin())  # type: ignore[arg-type]

    def stack(self, library: Library) -> LayerStack:
        layers = [
            StackLayer(*_linears(records, library), *norms, heads)
            for records, norms, heads in zip(self.records, self.norms, self.heads, strict=True)
        ]
        return LayerStack(library, layers, self.final_norm, EPS, self.cos, self.sin)

    def caches(self, num_blocks: int) -> list[LayerCache]:
        """Filled with NaN: what nobody has written must not be looked at."""
        shape = self.shape
        made = [
            make_cache(
                plain(torch.bfloat16),
                num_blocks,
                shape.block_size,
                shape.num_kv_heads,
                shape.head_dim,
                torch.device("cpu"),
            )
            for _ in shape.windows
        ]
        for cache in made:
            cache.keys.fill_(float("nan"))
            cache.values.fill_(float("nan"))
        return made

    def reference(self, x: torch.Tensor, library: Library) -> torch.Tensor:
        """One whole sequence [rows, hidden] from its first position on, in float64."""
        shape, residual = self.shape, x.double()
        rows, positions = len(x), torch.arange(len(x))
        for (qkv, out, gate_up, down), (first, second), heads in zip(self.records, self.norms, self.heads, strict=True):
            y = _linear(F.rms_norm(residual, (shape.hidden,), first.double(), EPS), qkv, library, is_fine=True)
            y = y.view(rows, -1, shape.head_dim).transpose(0, 1)
            q, k, v = y.split((shape.num_heads, shape.num_kv_heads, shape.num_kv_heads))
            if heads.norms is not None:
                q, k = (
                    F.rms_norm(t, (shape.head_dim,), w.double(), 1e-6) for t, w in zip((q, k), heads.norms, strict=True)
                )
            q, k = (self._rotated(t) for t in (q, k))
            k, v = (t.float().bfloat16().double() for t in (k, v))
            mask = positions.unsqueeze(0) <= positions.unsqueeze(1)
            if heads.window is not None:
                mask &= positions.unsqueeze(0) > positions.unsqueeze(1) - heads.window
            attended = F.scaled_dot_product_attention(
                q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), attn_mask=mask, enable_gqa=True
            )
            residual = residual + _linear(attended[0].transpose(0, 1).reshape(rows, -1), out, library)
            y = _linear(F.rms_norm(residual, (shape.hidden,), second.double(), EPS), gate_up, library)
            gate, up = y.chunk(2, dim=-1)
            residual = residual + _linear(F.silu(gate) * up, down, library)
        return F.rms_norm(residual, (shape.hidden,), self.final_norm.double(), EPS)

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        cos, sin = (t[: x.shape[1]].double() for t in (self.cos, self.sin))
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _linears(records: Sequence[PackedWeight], library: Library) -> Iterator[CpuInt8Linear]:
    """The first, qkv, with finer activations, as decoders have it."""
    return (CpuInt8Linear(record, library, is_fine=i == 0) for i, record in enumerate(records))


def _linear(x: torch.Tensor, record: PackedWeight, library: Library, *, is_fine: bool = False) -> torch.Tensor:
    order = slice(None) if record.perm is None else record.perm.long()
    rows = [rounded_row(row, library, is_fine=is_fine) for row in x[:, order]]
    y = torch.stack(rows) @ dequantize(replace(record, perm=None)).double()
    return y if record.bias is None else y + record.bias.double()


@pytest.fixture(params=[level for level in Level if LIBRARY is not None and level <= LIBRARY.level])
def library(request: pytest.FixtureRequest) -> Library:
    assert LIBRARY is not None
    return LIBRARY.at(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Session:
    """Sequences in a cache whose blocks are dealt out from the back, in turns."""

    def __init__(self, model: Model, library: Library, num_blocks: int = 700) -> None:
        self.model = model
        self.stack = model.stack(library)
        self.caches = model.caches(num_blocks)
        self.tables: dict[int, list[int]] = {}
        self._free = list(range(num_blocks))

    def run(self, *parts: tuple[int, int, torch.Tensor]) -> list[torch.Tensor]:
        """(sequence, start, x [rows, hidden]) of each part; what the stack makes of it."""
        spans = []
        for name, start, x in parts:
            table = self.tables.setdefault(name, [])
            while len(table) * self.model.shape.block_size < start + len(x):
                table.append(self._free.pop())
            spans.append((start, len(x), table))
        residual = torch.cat([x for _, _, x in parts])
        out = self.stack.run(residual, self.caches, NativeInputs.of(spans))
        return list(out.split([len(x) for _, _, x in parts]))


def inputs(model: Model, rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, model.shape.hidden, generator=torch.Generator().manual_seed(seed))


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", SHAPES)
def test_prompts_match_the_reference(library: Library, name: str) -> None:
    model = Model.of(SHAPES[name])
    session = Session(model, library)
    for rows in (1, 3, 50):
        x = inputs(model, rows, seed=rows)
        (got,) = session.run((rows, 0, x))
        # bfloat16 of the result, and the roundings that the module describes.
        assert error(got, model.reference(x, library)) < 2**-8 + 4e-3


@pytest.mark.parametrize("name", SHAPES)
def test_chunks_tokens_and_neighbours_change_no_bit(library: Library, name: str) -> None:
    model = Model.of(SHAPES[name])
    first, second, third = (inputs(model, rows, seed=rows) for rows in (45, 70, 9))
    whole = [Session(model, library).run((0, 0, x))[0] for x in (first, second, third)]
    session = Session(model, library)
    a, b = session.run((1, 0, first[:33]), (2, 0, second[:1]))
    c, d, e = session.run((2, 1, second[1:69]), (3, 0, third), (1, 33, first[33:44]))
    f, g = session.run((1, 44, first[44:]), (2, 69, second[69:]))
    assert torch.equal(torch.cat([a, e, f]), whole[0])
    assert torch.equal(torch.cat([b, c, g]), whole[1])
    assert torch.equal(d, whole[2])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", ["windows", "normed heads", "narrow heads", "activation order"])
def test_threads_change_no_bit(library: Library, name: str) -> None:
    """In a prompt, and in steps in which every sequence has one token."""
    model = Model.of(SHAPES[name])
    x, y = inputs(model, 40), inputs(model, 1, seed=1)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        session = Session(model, library)
        steps = [session.run((1, 0, x), (2, 0, y))]
        steps += [session.run((1, 40 + i, x[i : i + 1]), (2, 1 + i, x[i + 1 : i + 2])) for i in range(3)]
        found.append(torch.cat([part for step in steps for part in step]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_more_rows_than_pass_at_once() -> None:
    assert LIBRARY is not None
    model = Model.of(SHAPES["plain"])
    x, y = inputs(model, 600), inputs(model, 130, seed=1)
    session = Session(model, LIBRARY)
    got, other = session.run((1, 0, x), (2, 0, y))
    assert torch.equal(other, Session(model, LIBRARY).run((2, 0, y))[0])
    assert error(got, model.reference(x, LIBRARY)) < 2**-8 + 4e-3


def test_not_a_number_stays_in_its_sequence(library: Library) -> None:
    model = Model.of(SHAPES["plain"])
    x, y = inputs(model, 8), inputs(model, 8, seed=1)
    alone = Session(model, library).run((2, 0, y))[0]
    x[3, 5] = float("nan")
    first, second = Session(model, library).run((1, 0, x), (2, 0, y))
    assert not first[3:].isfinite().any()
    assert torch.equal(second, alone)


@pytest.mark.parametrize(
    ("spans", "says"),
    [
        ([(0, 3, [1])], "residual"),
        ([(POSITIONS - 1, 2, [1] * 400)], "beyond the model's"),
        ([(0, 2, [700])], "block ids are not all in"),
        ([(0, 2, [-1])], "block ids are not all in"),
        ([(7, 2, [1, 2])], "do not fit 8 slots"),
        ([(0, 1, [1]), (4, 1, [2])], "do not fit 4 slots"),
        ([(-1, 2, [1])], "do not fit"),
    ],
)
def test_steps_that_do_not_fit_are_refused(spans: Sequence[tuple[int, int, Sequence[int]]], says: str) -> None:
    assert LIBRARY is not None
    model = Model.of(SHAPES["plain"])
    session = Session(model, LIBRARY)
    with pytest.raises(ValueError, match=says):
        session.stack.run(inputs(model, 2), session.caches, NativeInputs.of(spans))


def test_what_does_not_belong_together_is_refused() -> None:
    assert LIBRARY is not None
    model = Model.of(SHAPES["plain"])
    stack = model.stack(LIBRARY)
    step = NativeInputs.of([(0, 2, [0])])
    with pytest.raises(ValueError, match="contiguous"):
        stack.run(inputs(model, 4)[::2], model.caches(2), step)
    with pytest.raises(ValueError, match=r"residual is torch\.bfloat16"):
        stack.run(inputs(model, 2).bfloat16(), model.caches(2), step)
    with pytest.raises(ValueError, match="1 caches of"):
        stack.run(inputs(model, 2), model.caches(2)[:1], step)
    other = Model.of(replace(SHAPES["plain"], head_dim=16, num_heads=12, num_kv_heads=4))
    with pytest.raises(ValueError, match="caches of"):
        stack.run(inputs(model, 2), other.caches(2), step)
    half = [replace(c, keys=c.keys.half()) for c in model.caches(2)]
    with pytest.raises(ValueError, match="contiguous bfloat16"):
        stack.run(inputs(model, 2), half, step)
    with pytest.raises(ValueError, match="angles are of 16"):
        LayerStack(LIBRARY, _layers(model), model.final_norm, EPS, model.cos[:, :8], model.sin[:, :8])
    layers = _layers(model)
    with pytest.raises(ValueError, match="layer 1 has linears of"):
        LayerStack(
            LIBRARY, [layers[0], replace(layers[1], out=layers[1].down)], model.final_norm, EPS, model.cos, model.sin
        )


def _layers(model: Model) -> list[StackLayer]:
    assert LIBRARY is not None
    return [
        StackLayer(*_linears(records, LIBRARY), *norms, heads)
        for records, norms, heads in zip(model.records, model.norms, model.heads, strict=True)
    ]


def test_sizes_without_kernels_are_named() -> None:
    assert can_stack(64, 96, Heads(4, 2, 32)) == (True, "")
    assert "multiples of 8" in can_stack(60, 96, Heads(4, 2, 32))[1]
    assert "head_dim 20" in can_stack(64, 96, Heads(4, 2, 20))[1]
    assert "head_dim 512" in can_stack(64, 96, Heads(4, 2, 512))[1]
    assert "share a key" in can_stack(64, 96, Heads(96, 1, 8))[1]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_scratch_is_what_the_plan_says(shape: Shape) -> None:
    assert LIBRARY is not None
    stack = Model.of(shape).stack(LIBRARY)
    widest = max(shape.hidden, shape.intermediate, shape.num_heads * shape.head_dim)
    heads = shape.num_heads, shape.num_kv_heads, shape.head_dim
    for rows, threads in ((1, 1), (3, 2), (256, 5), (257, 64)):
        planned = native_stack_room(rows, widest, shape.intermediate, heads, threads)
        assert planned == stack.room_bytes(rows, threads)


def test_the_check_of_a_layer_passes_and_sees_a_wrong_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LIBRARY is not None
    vectors = LIBRARY.at(LIBRARY.level)
    assert stack_check.is_right(vectors)
    vectors, real = LIBRARY.at(LIBRARY.level), Library.run_stack

    def wrong(self: Library, stack: Stack, sequences: Any, residual: torch.Tensor, hidden: torch.Tensor) -> None:
        real(self, stack, sequences, residual, hidden)
        if self is vectors:
            hidden[-1].neg_()

    monkeypatch.setattr(Library, "run_stack", wrong)
    assert not stack_check.is_right(vectors)
