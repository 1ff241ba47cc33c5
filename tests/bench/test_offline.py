"""`bench offline` on a tiny checkpoint: what it counts, never how long it took."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from qengine import cli
from qengine.bench.offline import BenchError, time_decode, time_prompt
from qengine.config import EngineConfig
from qengine.engine import Engine
from tests.engine.fixtures import path

MODEL = path("llama-awq-g64")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine.start(EngineConfig.from_options({"model": MODEL, "max_model_len": 256}))
    yield engine
    engine.shutdown()


def test_decode_counts_full_steps_and_leaves_the_engine_idle(engine: Engine) -> None:
    for batch in (1, 8):
        assert time_decode(engine, batch=batch, prompt_len=40, num_steps=4, seed=batch) > 0
        engine.check_integrity()
        assert not engine.has_unfinished
        assert engine.num_free_blocks == engine.info.num_blocks


def test_decode_refuses_to_count_when_sequences_had_to_wait() -> None:
    # Three sequences where two may run: the third gets its first token only after the others have ended.
    options = {"model": MODEL, "max_model_len": 128, "max_num_seqs": 2}
    engine = Engine.start(EngineConfig.from_options(options))
    try:
        with pytest.raises(BenchError, match="gave 3 tokens instead of 9"):
            time_decode(engine, batch=3, prompt_len=8, num_steps=3, seed=1)
    finally:
        engine.shutdown()


def test_prompts_are_never_served_from_the_cache(engine: Engine) -> None:
    assert time_prompt(engine, 64, seed=7) > 0
    with pytest.raises(BenchError, match="came from the prefix cache"):
        time_prompt(engine, 64, seed=7)


def test_the_command_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    words = "--batch 1 3 --random-input-len 24 --random-output-len 4 --runs 2 --max-model-len 256 --json"
    assert cli.main(["bench", "offline", str(MODEL), *words.split(), str(file)]) == 0
    record = json.loads(file.read_text(encoding="utf-8"))
    assert len(record["prompt_tokens_per_s"]["values"]) == 2
    assert set(record["decode_tokens_per_s"]) == {"1", "3"}
    shown = capsys.readouterr().out
    assert "prompt, 24 tokens" in shown
    assert "decode, 3 sequences" in shown
