"""Advice that works: whatever a line says is planned as a user would, and gives the context that the line names."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qengine.commands.flags import COMMANDS
from qengine.config import EngineConfig
from qengine.runtime.advice import advise
from qengine.runtime.model_bytes import ModelFacts
from qengine.runtime.planner import Machine, make_plan
from quant_kernels.footprint import WeightFacts
from tests.runtime.test_planner import LLAMA_3_8B, facts, gpu

MODEL = facts(LLAMA_3_8B)
LINE = re.compile(r"(.+): (?:fits a context of (\d+) tokens|the longest context that fits)")


def lines_of(machine: Machine, model: ModelFacts = MODEL, **options: object) -> tuple[str, ...]:
    config = EngineConfig.from_options(options)
    return advise(model, config, machine, make_plan(model, config, machine))


def follow(changes: str, machine: Machine, options: dict[str, object]) -> tuple[Machine, dict[str, object]] | None:
    """The request as a user changes it; None for a change of the checkpoint."""
    options = dict(options)
    for change in changes.split(", "):
        name, _, value = change.partition(" ")
        if name == "-tp":
            machine = replace(machine, cards=machine.cards[:1] * int(value.split()[0]))
        elif name == "--enforce-eager":
            machine = replace(machine, has_graphs=False)
        elif change == "no --kv-cache-memory-bytes":
            options.pop("kv_cache_memory_bytes")
        elif name.startswith("--"):
            flag = next(f for f in COMMANDS["plan"].flags.values() if f.name == name)
            options[flag.dest] = flag.parse(value, name)
        else:
            return None
    return machine, options


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([gpu(5.5), gpu(6.5), gpu(7), gpu(8), gpu(5, 5), gpu(24)]),
    st.sampled_from([None, 512, 8192]),
    st.sampled_from([None, 2**20, 4 * 2**30]),
)
def test_every_line_works(machine: Machine, length: int | None, cache_bytes: int | None) -> None:
    options: dict[str, object] = {"max_model_len": length, "kv_cache_memory_bytes": cache_bytes}
    config = EngineConfig.from_options(options)
    before = make_plan(MODEL, config, machine)
    lines = advise(MODEL, config, machine, before)
    assert bool(lines) == (not before.fits or before.is_lowered)
    for line in lines:
        match = LINE.fullmatch(line)
        assert match or line.startswith("no flag makes it fit"), line
        changed = follow(match[1], machine, options) if match else None
        if match is None or changed is None:
            continue
        found = make_plan(MODEL, EngineConfig.from_options(changed[1]), changed[0])
        assert found.fits, line
        assert match[2] is None or found.max_model_len == int(match[2]), line


def test_nothing_is_said_where_all_is_well() -> None:
    assert lines_of(gpu(24)) == ()


def test_a_shorter_context_comes_first() -> None:
    first, *_ = lines_of(gpu(8), max_model_len=8192)
    found = make_plan(MODEL, EngineConfig.from_options({"max_model_len": 8192}), gpu(8))
    assert first == f"--max-model-len {found.max_model_len}: the longest context that fits"


@pytest.mark.parametrize(
    "change",
    ["--kv-cache-dtype int8", "--kv-cache-dtype fp8", "--max-num-seqs 16", "a checkpoint with a 4-bit lm_head"],
)
def test_what_can_help_is_named(change: str) -> None:
    assert any(line.startswith(f"{change}: fits a context of ") for line in lines_of(gpu(8))), lines_of(gpu(8))


def test_a_4_bit_head_by_hand() -> None:
    # 128256 x 4096 in 2 bytes become half a byte each, and a scale for 128: the difference goes to the cache.
    plain = make_plan(MODEL, EngineConfig(), gpu(24))
    head = WeightFacts(4096, 128256, bits=4, group_size=128, zero_const=8)
    linears = tuple(replace(m, parts=(head,)) if m.role == "head" else m for m in MODEL.linears)
    packed = make_plan(replace(MODEL, linears=linears), EngineConfig(), gpu(24))
    saved = 128256 * 4096 * 2 - (128256 * 4096 // 2 + 2 * 33 * 128256)
    assert plain.cards[0].weight_bytes - packed.cards[0].weight_bytes == saved


def test_two_cards() -> None:
    lines = lines_of(gpu(5.5))
    assert sum(line.startswith("-tp 2 ") for line in lines) <= 1
    assert any("-tp" in line for line in lines)


def test_an_unquantized_model_is_told_of_4_bits() -> None:
    dense = tuple(replace(m, parts=tuple(replace(p, bits=None) for p in m.parts)) for m in MODEL.linears)
    model = replace(MODEL, linears=dense, bits=None, group_size=None, quantization=None)
    lines = lines_of(gpu(16), model)
    assert any(line.startswith("a 4-bit checkpoint (group 128): fits a context of 8192") for line in lines)


def test_small_groups_are_told_of_larger_ones() -> None:
    small = tuple(replace(m, parts=tuple(replace(p, group_size=32) for p in m.parts)) for m in MODEL.linears)
    model = replace(MODEL, linears=small, group_size=32)
    # So small a card that the scales make the difference.
    assert any("a checkpoint with groups of 128" in line for line in lines_of(gpu(7.5), model, max_num_seqs=8))


def test_changes_together_where_none_is_enough() -> None:
    together, more_cards = lines_of(gpu(6.2))
    assert together.count(", ") >= 1
    assert LINE.fullmatch(together)
    assert more_cards.startswith("-tp 2 ")


def test_where_nothing_helps_it_says_so() -> None:
    limited = gpu(0.5)
    [line] = lines_of(limited)
    assert line.startswith("no flag makes it fit (")
    assert line.endswith("take a smaller model, or larger or more cards")
