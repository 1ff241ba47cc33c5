"""Processes end quickly and say all that they had to say, and no more."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from qengine import __main__
from qengine.runtime import rank


def run(code: str) -> tuple[int, str, str]:
    """Exit code and output of a program whose streams are buffered."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
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
import atexit, ctypes, sys, threading
from qengine.process_end import exit_now
atexit.register(print, "clean-up")
threading.Thread(target=threading.Event().wait).start()
ctypes.CDLL(None).printf(b", and a library's")
sys.stdout.write("to the one")
sys.stderr.write("and the other")
exit_now(5)
"""
    assert run(code) == (5, "to the one, and a library's", "and the other")


@pytest.mark.parametrize("loss", ["os.close(1)", "sys.stdout.close()", "sys.stdout = None"])
def test_an_end_that_nobody_hears_is_one_all_the_same(loss: str) -> None:
    code = f"""
import os, sys
from qengine.process_end import exit_now
sys.stdout.write("to nobody")
{loss}
exit_now(4)
"""
    assert run(code)[0] == 4


@pytest.mark.parametrize("ends_with", [0, KeyboardInterrupt])
def test_the_command_skips_the_last_walk_however_it_ends(ends_with: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> int:
        if ends_with:
            raise ends_with
        return 0

    skipped = []
    modules = {
        "qengine.cli": SimpleNamespace(main=main),
        "qengine.process_end": SimpleNamespace(skip_last_walk=lambda: skipped.append(True)),
    }
    monkeypatch.setattr(__main__, "leave_at_once", lambda: None)
    monkeypatch.setattr(__main__, "import_late", modules.__getitem__)
    with nullcontext() if ends_with == 0 else pytest.raises(ends_with):
        assert __main__.main() == 0
    assert skipped == [True]


def test_a_rank_ends_at_once_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    order: list[object] = []
    modules = {
        "qengine.runtime.rank_service": SimpleNamespace(main=len),
        "qengine.process_end": SimpleNamespace(exit_now=codes.append),
    }
    monkeypatch.setattr(sys, "argv", ["rank", "3", "4"])
    monkeypatch.setattr(rank.signal, "signal", lambda *_: None)
    monkeypatch.setattr(rank, "import_late", lambda name: order.append(name) or modules[name])
    monkeypatch.setattr(rank, "open_channel", lambda *numbers: order.append(numbers) or numbers)
    rank.main()
    assert codes == [2]
    # It ends with its engine before it has torch.
    assert order == [(3, 4), *modules]


def test_what_a_rank_needs_to_end_with_its_engine_is_small() -> None:
    code = "from qengine.runtime.rank import open_channel; import sys; print('torch' in sys.modules)"
    assert run(code) == (0, "False\n", "")


def test_what_waits_for_ctrl_c_is_small() -> None:
    """Until `leave_at_once` has run, Ctrl-C shows a traceback."""
    code = "import qengine.__main__, sys; print([name for name in ('ctypes', 'logging') if name in sys.modules])"
    assert run(code) == (0, "[]\n", "")
