"""The decoder wholly on Triton's operations, in float32, against transformers: every architecture, chunked and mixed.

The same cases as on the CPU; `test_launches` counts what a layer costs. Float32 on tiny heads is for the interpreter
alone: on a machine with a GPU these are skipped, and `benchmarks.gpu_check` compares logits at real sizes there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from qengine.models.decoder import Decoder
from qengine.runtime.device_inputs import DeviceSteps
from quant_kernels.attention.kv_format import KVFormat
from quant_kernels.linear.dispatch import Target
from quant_kernels.tuning.card import KNOWN_CARDS
from quant_kernels.tuning.select import Selector
from quant_kernels.tuning.table import TuningTable
from tests.models.in_memory import CPU, FLOAT32, Sequences, build_from_state
from tests.models.test_decoder import CASES, make, prompt, reference_logits

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter; see benchmarks.gpu_check")
CARD = KNOWN_CARDS["4090"]
TARGET = Target(CPU, torch.float32, Selector(CARD, TuningTable.empty(CARD)))
BLOCK = 16


def on_triton(case: str, kv_format: KVFormat = FLOAT32) -> tuple[Any, Sequences]:
    oracle, on_cpu = make(case)
    model = build_from_state(on_cpu.config, oracle.state_dict(), TARGET)
    return oracle, sequences(model, kv_format)


def sequences(model: Decoder, kv_format: KVFormat = FLOAT32) -> Sequences:
    steps = DeviceSteps(model.config, model.rope, kv_format, BLOCK, CARD, CPU)
    return Sequences(model, 16, BLOCK, kv_format, steps)


@pytest.mark.parametrize("case", CASES)
def test_logits_match_transformers(case: str) -> None:
    oracle, runs = on_triton(case)
    a, b = prompt(40, 1), prompt(9, 2)
    expected = {"a": reference_logits(oracle, a), "b": reference_logits(oracle, b)}
    parts: dict[str, list[torch.Tensor]] = {"a": [], "b": []}
    for chunk in ({"a": a[:23]}, {"b": b[:8], "a": a[23:24]}, {"a": a[24:38], "b": b[8:]}, {"a": a[38:]}):
        for name, logits in runs.step(chunk).items():
            parts[name].append(logits)
    for name, pieces in parts.items():
        assert (torch.cat(pieces) - expected[name]).abs().max() < 1e-4
