"""The derived figures in docs/multi-gpu.md follow from the models' sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

_DOC = Path(__file__).resolve().parents[2] / "docs" / "multi-gpu.md"
#: hidden size and layers, as published with the models.
_SIZES = {
    "Llama-3-8B, Llama-2-7B": (4096, 32),
    "Llama-2-13B": (5120, 40),
    "Qwen2.5-32B": (5120, 64),
    "Llama-3-70B": (8192, 80),
}
_GB_PER_S = (25, 12, 6, 3)


@pytest.mark.parametrize("model", _SIZES)
def test_bytes_and_times_of_sums(model: str) -> None:
    hidden, layers = _SIZES[model]
    sums = 2 * layers
    per_token = sums * hidden * 2
    prompt_gb = per_token * 2048 / 1e9
    cells = [f"{sums}", f"{hidden * 2 // 1024}", f"{per_token / 1e6:.2f}", f"{prompt_gb:.2f}"]
    cells += [f"{prompt_gb / rate:.2f} s" for rate in _GB_PER_S]
    assert f"| {model} | {' | '.join(cells)} |" in _DOC.read_text(encoding="utf-8")
