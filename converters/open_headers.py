"""A path to an opened HeaderSource, whatever the format, without torch; `open` builds on it.

Invariant: only headers and small JSON files are read here; what is not supported, or not what was asked for, is refused
with the reason. A file's first bytes decide what it is, not its name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from converters.checkpoint import has_safetensors, pickled_weights
from converters.errors import CheckpointError
from converters.files import DataFile, is_inside, list_folder, shown
from converters.gguf_file import MAGIC
from converters.gguf_headers import GGUFHeaders
from converters.safetensors_headers import SafetensorsHeaders
from converters.source import HeaderSource

#: What may be asked for, and what it means. The names after Marlin choose kernels elsewhere; here they mean the format.
_REQUESTS = {
    "awq": "awq",
    "awq_marlin": "awq",
    "gptq": "gptq",
    "gptq_marlin": "gptq",
    "compressed-tensors": "compressed-tensors",
    "gguf": "gguf",
}
_UNFINISHED = ".partial"
_LATER_PART = re.compile(r"-(?!00001-of-)\d{5}-of-\d{5}\.gguf$")
_CONVERT_HINT = (
    "pickled weights can run any code when they are loaded, so they are never read here. Convert them on a machine "
    'where you trust them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained("converted") of transformers'
)


S = TypeVar("S", bound=HeaderSource)


@dataclass(frozen=True)
class Openers(Generic[S]):
    """What opens a folder of safetensors, and what opens a GGUF file."""

    safetensors: Callable[[Path], S]
    gguf: Callable[[Path], S]


def open_headers(path: str | os.PathLike[str], quantization: str | None = None) -> HeaderSource:
    """Open a checkpoint to look at its headers alone; see `open_checkpoint`."""
    openers: Openers[HeaderSource] = Openers(SafetensorsHeaders.open, GGUFHeaders)
    return open_with(openers, path, quantization)


def open_with(openers: Openers[S], path: str | os.PathLike[str], quantization: str | None) -> S:
    """Find out what is at a path, and open it.

    Raises:
        CheckpointError: if it cannot be loaded, or `quantization` disagrees with the file.
    """
    location = Path(path)
    _check_known(quantization)
    source = _open_folder(location, openers) if os.path.isdir(location) else _open_file(location, openers)
    _check_requested(source, quantization)
    return source


def _open_folder(folder: Path, openers: Openers[S]) -> S:
    if folder.resolve().name.endswith(_UNFINISHED):
        raise CheckpointError(f"{folder} is an export that was not finished; run the export again")
    names = list_folder(folder)
    if has_safetensors(names):
        return openers.safetensors(folder)
    models = [name for name in names if name.endswith(".gguf") and not name.startswith("mmproj")]
    first_parts = [name for name in models if not _LATER_PART.search(name)]
    if len(first_parts) > 1:
        raise CheckpointError(
            f"{folder} holds {len(first_parts)} GGUF models; name the file to load: {shown(', '.join(first_parts))}"
        )
    if models:
        path = folder / (first_parts or models)[0]
        if not is_inside(path):
            raise CheckpointError(f"{path} is a link to a file outside the folder; name that file, or put it there")
        return openers.gguf(path)
    pickles = pickled_weights(names)
    if pickles:
        raise CheckpointError(f"{folder} holds no safetensors but {shown(', '.join(pickles))}; {_CONVERT_HINT}")
    raise CheckpointError(
        f"{folder} holds no weights, expected *.safetensors or a .gguf file; found: "
        f"{shown(', '.join(names)) or 'nothing'}"
    )


def _open_file(path: Path, openers: Openers[S]) -> S:
    file = DataFile.at(path)
    head = file.read_bytes(0, min(len(MAGIC), file.num_bytes))
    if head == MAGIC or path.suffix == ".gguf":
        return openers.gguf(path)
    if pickled_weights([path.name]):
        raise CheckpointError(f"{path} cannot be loaded: {_CONVERT_HINT}")
    raise CheckpointError(
        f"{path} is no GGUF file; give a .gguf file, or the folder that holds config.json and *.safetensors"
    )


def _check_known(quantization: str | None) -> None:
    if quantization is not None and quantization.lower() not in _REQUESTS:
        known = ", ".join(_REQUESTS)
        raise CheckpointError(f"quantization '{shown(quantization)}' is not known; known: {known}, or leave it out")


def _check_requested(source: HeaderSource, quantization: str | None) -> None:
    if quantization is None or _REQUESTS[quantization.lower()] == source.quantization:
        return
    found = f"{(source.quantization or '').upper() or 'not quantized'} ({source.description})"
    raise CheckpointError(
        f"{source.path} is {found}, but quantization '{quantization}' was asked for; leave the option out, or give "
        "another checkpoint"
    )
