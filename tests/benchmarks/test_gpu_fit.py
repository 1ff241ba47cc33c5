"""The part that holds memory against its plan, with ranks in processes of their own on a CPU."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.gpu import fit
from benchmarks.gpu.report_fit import section
from benchmarks.gpu.workloads import GIB, Fit
from tests.benchmarks.tiny import TINY

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the real thing: make gpu-check")
WORKLOAD = Fit("tiny", sequences=2, tokens=12, decode_tokens=4, memory_limit=GIB)
TWO_RANKS = replace(WORKLOAD, ranks=2)


def command(dtype: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "tests.benchmarks.tiny_rank", dtype)


def test_ranks_sample_the_tokens_of_one() -> None:
    (alone,) = fit.measure(WORKLOAD, TINY, command("float32"))
    ranks = fit.measure(TWO_RANKS, TINY, command("float32"))
    assert {record["tokens_digest"] for record in ranks} == {alone["tokens_digest"]}
    assert ranks[0]["weight_bytes"] < alone["weight_bytes"]
    # The prompt's own step gives the first token.
    assert [record["decode_steps"] for record in (alone, *ranks)] == [WORKLOAD.decode_tokens - 1] * 3


def test_ranks_take_what_was_planned() -> None:
    ranks = fit.measure(TWO_RANKS, TINY, command("float16"))
    assert [record["rank"] for record in ranks] == [0, 1]
    for record in ranks:
        assert record["weight_bytes"] == record["planned_weight_bytes"]
        assert record["kv_bytes"] == record["planned_kv_bytes"]
        assert record["weight_bytes"] + record["kv_bytes"] < record["planned_bytes"] < WORKLOAD.memory_limit
    text = section(ranks)
    assert "| tiny | 1 of 2 | 2 | 12 |" in text
    assert "not measured" in text


def test_a_rank_that_fails_fails_the_part() -> None:
    with pytest.raises(SystemExit, match="rank 0 ended with exit code 3"):
        fit.measure(WORKLOAD, TINY, (sys.executable, "-c", "raise SystemExit(3)"))


RECORD: dict[str, Any] = {
    "model": "llama-3-70b", "rank": 1, "ranks": 2, "sequences": 8, "context": 2048, "memory_limit": 24 * GIB,
    "planned_bytes": 20 * GIB, "peak_reserved": 20 * GIB, "peak_loading": GIB, "decode_tokens_per_s": 12.34,
    "tokens_digest": "a",
}  # fmt: skip


@pytest.mark.parametrize(
    ("peak", "problem"),
    [
        (20 * GIB, None),
        (20 * GIB + 1, "rank 1 took 1 bytes more than planned"),
        (int(20 * GIB * 0.98), None),
        (int(20 * GIB * 0.96), "bytes planned unused"),
    ],
)
def test_a_peak_is_held_against_the_plan(peak: int, problem: str | None) -> None:
    found = fit.faults({**RECORD, "peak_reserved": peak})
    assert found == [] if problem is None else problem in found[0]
    assert ("OFF THE PLAN" in section([{**RECORD, "peak_reserved": peak}])) == (problem is not None)


def test_what_is_off_the_plan_fails_the_part_after_its_records(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [RECORD, {**RECORD, "rank": 0, "peak_reserved": 21 * GIB, "tokens_digest": "b"}]
    monkeypatch.setattr(fit, "measure", lambda workload, config: wrong)
    monkeypatch.setattr(fit, "CONFIGS", {"tiny": TINY})
    spec = json.loads(json.dumps({"workload": WORKLOAD.to_json()}))
    found = fit.records(spec)
    assert [next(found), next(found)] == wrong
    with pytest.raises(SystemExit, match=r"rank 0 took .* more than planned; ranks sampled different tokens"):
        next(found)
