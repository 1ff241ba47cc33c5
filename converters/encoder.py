"""HubEncoder: a checkpoint's tokenizer as transformers runs it, for calibration texts.

Invariant: nothing of the checkpoint is executed but its chat template, in transformers' sandbox.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.files import shown
from converters.gguf_source import GGUFSource
from converters.gguf_tokenizer import read_tokenizer
from converters.late import import_transformers


class HubEncoder:
    """Text to ids, and conversations to text; see `calibrate.TextEncoder`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def open(cls, source: object, path: Path) -> HubEncoder:
        """The tokenizer of what was opened at `path`.

        Raises:
            CheckpointError: if there is none, or it is broken.
        """
        if isinstance(source, GGUFSource):
            return cls._of_metadata(source.metadata)
        try:
            tokenizer = import_transformers().AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        except Exception as error:
            raise CheckpointError(
                f"{path}: no tokenizer can be made of its files: {shown(error)}. Calibration texts need one; --method "
                "rtn does without"
            ) from error
        return cls(tokenizer)

    @classmethod
    def _of_metadata(cls, metadata: Mapping[str, Any]) -> HubEncoder:
        found = read_tokenizer(metadata)
        template = found.chat_template if isinstance(found.chat_template, str) else None
        tokenizer = import_transformers().PreTrainedTokenizerFast(
            tokenizer_object=found.backend, chat_template=template, **found.special_tokens
        )
        return cls(tokenizer)

    @property
    def chat_template(self) -> str | None:
        """None if conversations have no form of this model's own."""
        template = self._tokenizer.chat_template
        if isinstance(template, Mapping):
            template = template.get("default")
        return template if isinstance(template, str) else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Sequence[int]:
        """Token ids of a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)
        return ids

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """A conversation as the model's own text."""
        text: str = self._tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text
