"""One small model for the whole folder, in float32 so that tokens are exactly reproducible."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qengine import LLM
from tests.engine.fixtures import path


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    with LLM(path("llama-awq-g64"), dtype="float32", max_model_len=256) as engine:
        yield engine


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test that used it, the shared engine is idle and all its blocks are free."""
    yield
    if "llm" in request.fixturenames:
        engine = request.getfixturevalue("llm").engine
        engine.check_integrity()
        assert not engine.has_unfinished
        assert engine.num_free_blocks == engine.info.num_blocks
