"""One small vocabulary and one compiler for the whole folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qengine.grammars.compiler import GrammarCompiler
from qengine.grammars.vocabulary import Vocabulary
from qengine.tokenizer import Tokenizer, load_tokenizer
from tests.engine.fixtures import path


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(path("llama-awq-g64"))


@pytest.fixture(scope="session")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary.of(tokenizer, 2048, tokenizer.eos_token_ids)


@pytest.fixture(scope="session")
def compiler(vocabulary: Vocabulary) -> Iterator[GrammarCompiler]:
    # A busy machine may need more than the usual two seconds; the limit has tests of its own.
    made = GrammarCompiler(lambda: vocabulary, seconds=60)
    yield made
    made.close()
