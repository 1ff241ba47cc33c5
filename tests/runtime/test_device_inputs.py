"""A step's inputs for a GPU: against plain definitions, from one buffer, and foreseen ones against fresh ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from qengine import SamplingParams
from qengine.layers.rope import RotaryEmbedding
from qengine.models.registry import find_spec
from qengine.models.spec import read_model_config
from qengine.runtime.device_inputs import DeviceSteps, StaticInputs, StepArrays
from qengine.runtime.packed_ints import Layout, write
from qengine.scheduling.batch import Batch, BatchEntry, SampleSpec
from quant_kernels.attention.kv_format import plain
from quant_kernels.ops.triton_ops import TritonInputs
from quant_kernels.tuning.card import KNOWN_CARDS
from tests.engine.triton_engine import TINY

CPU = torch.device("cpu")
BLOCK = 16
CONFIG = read_model_config(TINY, find_spec(TINY))
SAMPLE = SampleSpec(SamplingParams(), 0, (1,), (), frozenset())


def make_steps() -> DeviceSteps:
    rope = RotaryEmbedding(CONFIG.rope, CONFIG.head_dim, 512, CPU)
    return DeviceSteps(CONFIG, rope, plain(torch.float16), BLOCK, KNOWN_CARDS["4090"], CPU)


def entry(name: str, start: int, ids: Sequence[int], *, first_block: int, sample: bool = True) -> BatchEntry:
    number = -(-(start + len(ids)) // BLOCK)
    blocks = tuple(range(first_block, first_block + 3 * number, 3))
    return BatchEntry(name, tuple(ids), start, blocks, SAMPLE if sample else None)


def test_every_row_stands_where_it_should() -> None:
    entries = (entry("a", 20, [7, 8, 9], first_block=4), entry("b", 0, [5], first_block=100, sample=False))
    step = make_steps().prepare(Batch(entries))
    assert isinstance(step.inputs, TritonInputs)
    assert step.token_ids.tolist() == [7, 8, 9, 5]
    assert step.inputs.placement.positions.tolist() == [20, 21, 22, 0]
    assert step.inputs.placement.slots.tolist() == [7 * BLOCK + 4, 7 * BLOCK + 5, 7 * BLOCK + 6, 100 * BLOCK]
    assert step.inputs.blocks.tolist() == [4, 7, 100]
    assert step.sample_rows.tolist() == [2]
    assert step.first_rows == (0, 3)
    for tensor in (step.token_ids, step.inputs.placement.slots, step.inputs.blocks):
        assert tensor.storage_offset() % 4 == 0


def test_rows_that_fill_up_store_nothing() -> None:
    static = StaticInputs(make_steps(), 4, 32)
    static.load([entry("a", 20, [7], first_block=4), entry("b", 0, [5], first_block=100)])
    placement = static.inputs.placement
    assert static.token_ids.tolist() == [7, 5, 0, 0]
    assert placement.slots.tolist() == [7 * BLOCK + 4, 100 * BLOCK, -1, -1]
    [work] = static.inputs.work.values()
    assert int(work.num_items) == 2
    before = static.token_ids.data_ptr()
    static.load([entry("a", 21, [9], first_block=4)])
    assert static.token_ids.data_ptr() == before
    assert static.token_ids.tolist() == [9, 0, 0, 0]


def same(a: StepArrays, b: StepArrays) -> bool:
    return a.tile == b.tile and all(np.array_equal(a.arrays[name], b.arrays[name]) for name in b.arrays)


@settings(deadline=None)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=6), st.data())
def test_a_foreseen_step_is_the_step(starts: list[int], data: st.DataObject) -> None:
    """Sequences go on, cross into new blocks, leave, join, and get other blocks than they had."""
    foreseeing, free = make_steps(), iter(range(1000, 9999))
    live = {str(i): (start, list(range(100 * i, 100 * i + start // BLOCK + 1))) for i, start in enumerate(starts)}
    for _ in range(5):
        entries = [BatchEntry(name, (len(b),), start, tuple(b), SAMPLE) for name, (start, b) in live.items()]
        assert same(foreseeing.decode_arrays(entries), make_steps().arrays(entries))
        foreseeing.foresee(entries)
        change = data.draw(st.sampled_from(["none", "leave", "join", "move"]))
        live = {name: (start + 1, blocks) for name, (start, blocks) in live.items()}
        if change == "leave" and len(live) > 1:
            live.pop(next(iter(live)))
        if change == "join":
            live[f"new {next(free)}"] = (3, [next(free)])
        for name, (start, blocks) in live.items():
            grown = [*blocks, next(free)] if start == len(blocks) * BLOCK else blocks
            live[name] = start, [next(free) for _ in grown] if change == "move" else list(grown)


def test_what_was_foreseen_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = make_steps()
    first, second = (BatchEntry("a", (1,), start, tuple(range(1 + start // BLOCK)), SAMPLE) for start in (15, 16))
    steps.foresee([first])
    monkeypatch.setattr(steps, "arrays", None)
    found = steps.decode_arrays([second]).arrays
    assert found["slots"].tolist() == [16]
    assert found["blocks"].tolist() == [0, 1]


def test_what_does_not_fit_its_place_is_our_bug() -> None:
    layout = Layout.of({"a": 2, "b": 3})
    with pytest.raises(AssertionError, match="3 numbers do not fit the 2 of a"):
        write(layout, {"a": np.arange(3), "b": np.arange(3)}, pinned=False)
