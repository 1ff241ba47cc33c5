"""A server of the real engine on a small AWQ checkpoint, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qengine.config import EngineConfig
from qengine.engine import Engine
from tests.engine.fixtures import path
from tests.serving.running import Running, serving

TEXT = "/v1/completions"
PROMPT = "The quick brown fox jumps over the lazy dog"


def start_engine(**more: Any) -> Engine:
    options = {
        "model": path("llama-awq-g64"),
        "dtype": "float32",
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "kv_cache_memory_bytes": 32 * 2**20,
        **more,
    }
    return Engine.start(EngineConfig.from_options(options))


@contextmanager
def small_server(
    *, prefix: str = "qengine:", server_options: dict[str, Any] | None = None, **engine_options: Any
) -> Iterator[Running]:
    """A fresh engine, so that counts begin at zero."""
    options = {"served_model_names": ("tiny",), "metrics_prefix": prefix, **(server_options or {})}
    with serving(start_engine(**engine_options), **options) as running:
        yield running


def body(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 10, "ignore_eos": True, **more}
