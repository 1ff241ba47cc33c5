"""Processes end quickly and say all that they had to say, and no more."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("library", ["torch", "triton.language"])
def test_the_last_walk_is_skipped_without_a_word(library: str) -> None:
    """Triton's library prints what is left of it when a process ends, as objects that are never looked at are."""
    pytest.importorskip(library)
    code = f"""
import gc
import {library}
from qengine.imports import freeze_live_objects
from qengine.process_end import skip_last_walk
freeze_live_objects()
skip_last_walk()
print(gc.get_freeze_count() > 0)
"""
    assert run(code) == (0, f"{library == 'torch'}\n", "")


def test_what_was_said_is_heard_before_the_end() -> None:
    code = """
import atexit, sys, threading
from qengine.process_end import exit_now
atexit.register(print, "clean-up")
threading.Thread(target=threading.Event().wait).start()
sys.stdout.write("to the one")
sys.stderr.write("and the other")
exit_now(5)
"""
    assert run(code) == (5, "to the one", "and the other")


def test_an_end_that_nobody_hears_is_one_all_the_same() -> None:
    code = """
import os, sys
from qengine.process_end import exit_now
sys.stdout.write("to nobody")
os.close(1)
exit_now(4)
"""
    assert run(code)[0] == 4
