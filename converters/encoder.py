"""HubEncoder: a checkpoint's tokenizer as transformers runs it, for calibration texts.

Invariant: nothing of the checkpoint is executed, its chat template included: transformers bounds neither the time nor
the memory of one. Conversations become plain turns here; the engine bounds templates, and gives an encoder of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.files import DataFile, list_folder, shown
from converters.gguf_source import GGUFSource
from converters.gguf_tokenizer import read_tokenizer
from converters.late import import_transformers

#: The largest published tokenizer.json has 33 MB.
_MAX_FILE_BYTES = 2**26
_SUFFIXES = (".json", ".model", ".txt", ".jinja")


class HubEncoder:
    """Text to ids; see `calibrate.TextEncoder`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def open(cls, source: object, path: Path) -> HubEncoder:
        """The tokenizer of what was opened at `path`.

        Raises:
            CheckpointError: if there is none, or it is broken.
        """
        if isinstance(source, GGUFSource):
            found = read_tokenizer(source.metadata)
            make = import_transformers().PreTrainedTokenizerFast
            with _failures(path):
                return cls(make(tokenizer_object=found.backend, **found.special_tokens))
        _require_sound_files(path)
        with _failures(path):
            tokenizer = import_transformers().AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
        return cls(tokenizer)

    @property
    def chat_template(self) -> str | None:
        """None: see above."""
        return None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Sequence[int]:
        """Token ids of a text. Raises CheckpointError if the tokenizer fails."""
        with _failures("the calibration texts"):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)
        return ids

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """Raises CheckpointError: there is no template."""
        raise CheckpointError("the model's chat template is not run here; use `qengine quantize`")


def _require_sound_files(folder: Path) -> None:
    """What transformers may read: regular files, and none without end."""
    for name in list_folder(folder):
        if name.endswith(_SUFFIXES) and not name.endswith(".index.json"):
            file = DataFile.at(folder / name)
            if file.num_bytes > _MAX_FILE_BYTES:
                raise CheckpointError(
                    f"{folder / name} has {file.num_bytes} bytes, at most {_MAX_FILE_BYTES} are expected"
                )


@contextmanager
def _failures(where: object) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        # A panic of the tokenizers library is a BaseException whose type cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"{where}: no tokenizer can be made of the model's files, or it fails: {shown(error)}. Calibration texts "
            "need one; --method rtn does without"
        ) from error
