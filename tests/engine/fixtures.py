"""The checkpoints written by other programs, and what they must answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "fixtures"
NAMES = sorted(p.name for p in FOLDER.iterdir() if p.is_dir())


@dataclass(frozen=True)
class Expected:
    """One prompt with its 24 greedy tokens and their log-probabilities, from an independent float32 computation."""

    prompt: str
    prompt_token_ids: list[int]
    greedy_token_ids: list[int]
    logprobs: list[float]
    text: str


def path(name: str) -> str:
    return str(FOLDER / name)


def expected(name: str) -> list[Expected]:
    rows = json.loads((FOLDER / name / "expected.json").read_text())
    return [Expected(**row) for row in rows]
