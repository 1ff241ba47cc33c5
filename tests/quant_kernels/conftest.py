"""The device that Triton kernels run on: a GPU where there is one, else the CPU through Triton's interpreter.

Tests marked `gpu` run at real sizes and are skipped where there is none. Systems that triton is not made for skip the
tests of its kernels.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

_NEED_TRITON = ["test_p16_*", "test_elementwise*", "test_sampling*", "test_gpu*", "test_resources*", "test_tuning*"]
collect_ignore_glob = [] if find_spec("triton") else _NEED_TRITON


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
