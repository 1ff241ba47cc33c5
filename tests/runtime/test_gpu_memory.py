"""What a card's memory is shared out to, and which device is taken, on made-up cards."""

from __future__ import annotations

import logging

import pytest
import torch

from qengine.config import CacheConfig, EngineConfig
from qengine.errors import ConfigError
from qengine.runtime import gpu_memory, platform
from qengine.runtime.planner import plan_memory
from quant_kernels.attention.kv_format import FP8_E5M2, INT8, plain
from tests.runtime.test_planner import LLAMA_3_8B

GIB = 2**30
DEVICE = torch.device("cuda", 0)
WEIGHTS = int(5.4 * GIB)


def card(monkeypatch: pytest.MonkeyPatch, total: float, free: float | None = None, reserved: float = 0.0) -> None:
    """Pretend that there is a card of so many GiB."""
    sizes = int((total if free is None else free) * GIB), int(total * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: sizes)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: int(reserved * GIB))


def budget(*, batched_tokens: int = 2048, with_graphs: bool = True, total: float = 22.0) -> gpu_memory.GpuBudget:
    return gpu_memory.plan_gpu(
        LLAMA_3_8B,
        int(total * GIB),
        WEIGHTS,
        batched_tokens=batched_tokens,
        max_num_seqs=256,
        with_graphs=with_graphs,
    )


def test_every_byte_is_given_to_someone() -> None:
    found = budget()
    parts = (found.weights, found.step, found.graphs, found.context, found.kv_cache)
    assert sum(parts) == found.total
    assert min(parts) > 0
    assert budget(batched_tokens=8192).kv_cache < found.kv_cache
    assert budget(with_graphs=False).graphs == 0
    assert budget(with_graphs=False).kv_cache == found.kv_cache + found.graphs
    assert budget(total=1.0).kv_cache == 0
    assert found.text.startswith("22.00 GiB = 5.40 GiB for weights, ")
    assert found.text.endswith(" for the KV cache")


def test_an_8b_model_leaves_most_of_a_24_gb_card_to_the_cache() -> None:
    assert 10 * GIB < budget().kv_cache < 16 * GIB


def test_half_the_bytes_are_twice_the_blocks() -> None:
    def blocks(kv_format: object) -> int:
        per_token = LLAMA_3_8B.num_layers * kv_format.bytes_per_token(8, 128)  # type: ignore[attr-defined]
        found = plan_memory(LLAMA_3_8B, EngineConfig(), kv_bytes_per_token=per_token, free_bytes=8 * GIB, on_gpu=True)
        assert found.kv_cache_bytes <= 8 * GIB
        return found.num_blocks

    half = blocks(plain(torch.float16))
    assert half == 8 * GIB // (16 * 2**17)
    assert blocks(FP8_E5M2) == 2 * half
    assert blocks(INT8) == int(2 * half / (1 + 2 / 128))


def test_a_share_or_a_limit_and_never_more_than_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, 24)
    assert gpu_memory.allowed_bytes(CacheConfig(), DEVICE) == int(24 * GIB * 0.92)
    assert gpu_memory.allowed_bytes(CacheConfig(gpu_memory_limit=20 * GIB), DEVICE) == 20 * GIB
    card(monkeypatch, 24, free=10, reserved=2)
    assert gpu_memory.allowed_bytes(CacheConfig(), DEVICE) == 12 * GIB
    with pytest.raises(ConfigError, match=r"gpu_memory_limit is 30.00 GiB, but the GPU has 24.00 GiB; lower it"):
        gpu_memory.allowed_bytes(CacheConfig(gpu_memory_limit=30 * GIB), DEVICE)


def test_large_cards_take_large_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, 24)
    assert gpu_memory.default_batched_tokens(DEVICE) == 2048
    card(monkeypatch, 79)
    assert gpu_memory.default_batched_tokens(DEVICE) == 8192


@pytest.mark.parametrize(
    ("most", "expected"), [(1, (1,)), (3, (1, 2, 4)), (16, (1, 2, 4, 8, 16)), (20, (1, 2, 4, 8, 16, 24))]
)
def test_buckets_reach_the_largest_batch(most: int, expected: tuple[int, ...]) -> None:
    assert gpu_memory.buckets(most) == expected
    assert gpu_memory.buckets(1000) == gpu_memory.BUCKETS


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
