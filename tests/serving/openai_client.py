"""The bundled model behind a server, and the official `openai` client of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai

from qengine.config import EngineConfig
from qengine.engine import Engine
from tests.serving.running import Running, serving


@contextmanager
def bundled_server(**engine_options: Any) -> Iterator[Running]:
    """The bundled model, called smol."""
    engine = Engine.start(EngineConfig.from_options({"max_model_len": 1024, **engine_options}))
    with serving(engine, served_model_names=("smol",), max_queue=32) as running:
        yield running


@contextmanager
def connected(server: Running, seconds: float) -> Iterator[openai.OpenAI]:
    """A client; afterwards the model speaks as before, and nothing may be left in the engine."""
    tokenizer = server.engine.tokenizer
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=seconds) as opened:
        yield opened
    server.engine.tokenizer = tokenizer
    check_nothing_is_left(server)


def check_nothing_is_left(server: Running) -> None:
    server.wait_until_quiet()
    assert server.engine.num_free_blocks == server.engine.info.num_blocks
    server.engine.check_integrity()
