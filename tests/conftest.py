"""Settings of the whole suite: one thread, because tiny models lose more to waking threads than they gain; Ctrl-C as in
a terminal, because a job that runs in the background starts with it ignored; compiled modules are kept even where the
environment says not to, because hundreds of processes import them; where there is no GPU, Triton's interpreter, which
must be asked for before any kernel is imported; the longest files first, so that none is left for the end; ranks forked
instead of started; no time limit for hypothesis' examples, since timings decide nothing; and Python's collector kept
from looking at what is imported, until a test lets it."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest

gc.disable()  # Until everything is imported: none of it is garbage.

import torch  # noqa: E402

#: Files that take the longest, the longest first.
LONGEST = (
    "tests/engine/test_triton_engine.py",
    "tests/cli/test_whole_way.py",
    "tests/converters/test_fuzz.py",
    "tests/benchmarks/test_gpu_models.py",
    "tests/cli/test_quantize.py",
)

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
signal.signal(signal.SIGINT, signal.default_int_handler)

from tests import forking, interpreter  # noqa: E402 - it imports triton, which reads the environment

interpreter.quicken()
with suppress(ImportError):  # Not where a GPU is.
    from hypothesis import settings

    settings.register_profile("patient", deadline=None)
    settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def _quick_start() -> Iterator[None]:
    with forking.quick_start():
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    interpreter.check_overflow(item.nodeid.startswith("tests/quant_kernels/"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    gc.enable()  # This process collects no tests.


def pytest_unconfigure() -> None:
    gc.unfreeze()  # What is left at the end is a leak to triton's library.
