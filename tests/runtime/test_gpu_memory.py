"""A card as torch shows it, and which device is taken, on made-up cards."""

from __future__ import annotations

import logging

import pytest
import torch

from qengine.errors import ConfigError
from qengine.runtime import gpu_memory, platform
from qengine.runtime.planner import CONTEXT_BYTES, Card

GIB = 2**30
DEVICE = torch.device("cuda", 0)


def test_a_card_as_it_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Made Up")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (10 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 2 * GIB)
    assert gpu_memory.card_of(DEVICE) == Card("Made Up", 24 * GIB, 12 * GIB)


def test_torch_is_held_to_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (80 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: fractions.append(share))
    gpu_memory.cap_process(24 * GIB, DEVICE)
    assert fractions == [(24 * GIB - CONTEXT_BYTES) / (80 * GIB)]


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert platform.choose_device("auto").type == "cpu"
    with pytest.raises(ConfigError, match=r"device is 'cuda', but torch sees no CUDA GPU.*; or use --device cpu"):
        platform.choose_device("cuda")


def test_an_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(ConfigError, match="Tesla T4 is sm_75, and the kernels need sm_80 or newer"):
        platform.choose_device("cuda")
    with caplog.at_level(logging.WARNING):
        assert platform.choose_device("auto").type == "cpu"
    assert "running on the CPU although there is a GPU: Tesla T4 is sm_75" in caplog.text


def test_dtypes() -> None:
    cpu = torch.device("cpu")
    assert platform.choose_dtype("auto", cpu, "float16") == torch.bfloat16
    assert platform.choose_dtype("auto", DEVICE, "bfloat16") == torch.bfloat16
    for stored in ("float16", "float32", None):
        assert platform.choose_dtype("auto", DEVICE, stored) == torch.float16
    with pytest.raises(ConfigError, match="dtype is float32, which has no kernels on a GPU"):
        platform.choose_dtype("float32", DEVICE)
