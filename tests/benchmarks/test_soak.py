"""The soak: a sound engine passes a short one, and a leak of blocks or of memory is found."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from benchmarks.soak import MAX_BYTES_PER_MINUTE, Verdict, calls, growth_per_minute, soak, table
from qengine.config import EngineConfig
from qengine.engine import Engine
from tests.engine.fixtures import path

SOUND = Verdict(10, 8, 2, 100, 50, 1.0, 2**20, 2**20, 0.0, 0, True)


def start() -> Engine:
    options = {
        "model": path("llama-gptq-sym-g128"),
        "max_model_len": 128,
        "device": "cpu",
        "kv_cache_memory_bytes": 2**20,
    }
    return Engine.start(EngineConfig.from_options(options))


def test_a_sound_engine_frees_everything_and_answers_as_before() -> None:
    verdict, tally = asyncio.run(soak(start(), 120, seed=1))
    assert verdict.num_finished + verdict.num_left == 120
    assert verdict.num_left > 5
    assert verdict.leaked_blocks == 0
    assert verdict.canary_is_same
    assert tally.memory


def test_a_leaked_block_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start()
    pool = engine.scheduler.pool
    monkeypatch.setattr(Engine, "check_integrity", lambda self: None)  # It would notice too.
    monkeypatch.setattr("benchmarks.soak._settled_blocks", lambda engine, expected: _one_less(pool.num_free))
    verdict, _ = asyncio.run(soak(engine, 3, seed=1))
    assert verdict.leaked_blocks == 1
    assert not verdict.is_sound
    assert "1 leaked" in table(verdict)


async def _one_less(count: int) -> int:
    return count - 1


def test_growth_is_the_slope() -> None:
    assert growth_per_minute([(t, 1000 + 5 * t) for t in range(20)]) == pytest.approx(300)
    assert growth_per_minute([(0.0, 5)]) == 0.0
    one_step = [(float(t), 10_000 if t < 30 else 50_000) for t in range(100)]
    assert growth_per_minute(one_step) == 0.0
    noisy = [(float(t), 10_000 + (500 if t % 2 else -500)) for t in range(100)]
    assert abs(growth_per_minute(noisy)) < 100


@pytest.mark.parametrize(
    "change", [{"leaked_blocks": 1}, {"canary_is_same": False}, {"bytes_per_minute": float(MAX_BYTES_PER_MINUTE)}]
)
def test_what_is_not_sound(change: dict[str, float]) -> None:
    assert SOUND.is_sound
    assert not replace(SOUND, **change).is_sound
    assert "NOT sound" in table(replace(SOUND, **change))


def test_calls_are_mixed_and_repeatable() -> None:
    engine = start()
    some, again = (list(calls(engine, 300, seed=2)) for _ in range(2))
    assert some == again
    assert {call.patience for call in some} == {None, 0, 1, 2, 3}
    assert max(len(call.prompt) for call in some) >= 32
    assert {call.params.n for call in some} == {1, 3}
    engine.shutdown()
