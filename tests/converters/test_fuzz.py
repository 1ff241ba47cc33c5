"""Mutated checkpoints of both kinds, for a minute: refused with the one error, quickly, and without taking memory.

Half a minute each; QENGINE_FUZZ_SECONDS says otherwise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.converters.fuzz import KINDS

ROOT = Path(__file__).parents[2]
SECONDS = float(os.environ.get("QENGINE_FUZZ_SECONDS") or "30")


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_are_refused_quickly_and_cheaply(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.converters.fuzz", kind, str(SECONDS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS + 120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["refused"] > 5 * SECONDS, found
    assert found["grew_bytes"] < 100 * 2**20, found
    assert found["slowest_s"] < 1, found
