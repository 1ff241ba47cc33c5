"""IdsOnlyTokenizer: stands in for the tokenizer of a folder that has none, as folders for dummy weights may.

Invariant: ids pass through and every one of them is the text "". Whatever needs text to become ids is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import tokenizers

from qengine.errors import RequestError
from qengine.tokenizer.chat_template import DEFAULT_MAX_CHARS
from qengine.tokenizer.tokenizer import Tokenizer


class IdsOnlyTokenizer(Tokenizer):
    """Takes token ids alone.

    Args:
        where: the model's name, for messages.
    """

    def __init__(self, where: str) -> None:
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.decoder = tokenizers.decoders.ByteLevel()
        super().__init__(backend)
        self._where = where

    @property
    def reads_text(self) -> bool:
        return False

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Raises RequestError."""
        self._refuse("prompt")

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        max_chars: int = DEFAULT_MAX_CHARS,
        template_options: Mapping[str, Any] | None = None,
    ) -> str:
        """Raises RequestError."""
        self._refuse("messages")

    def _refuse(self, param: str) -> NoReturn:
        raise RequestError(
            f"{self._where} has no tokenizer, so it takes token ids and no text; give prompts as lists of token ids, "
            "or a folder with a tokenizer as --tokenizer",
            param=param,
        )
