"""The way in: a path to an opened WeightSource, whatever the format.

Invariant: only headers and small JSON files are read here; what is not supported, or not what was asked for, is refused
with the reason.
"""

from __future__ import annotations

import os
from pathlib import Path

from converters.detect import check_requested
from converters.errors import CheckpointError
from converters.gguf_source import GGUFSource, find_gguf
from converters.safetensors_source import SafetensorsSource
from converters.source import WeightSource


def open_checkpoint(path: str | os.PathLike[str], quantization: str | None = None) -> WeightSource:
    """Open a folder of safetensors, a GGUF file, or a folder that holds one.

    Args:
        quantization: what the caller believes the file to be: "awq", "gptq", "gguf" (or vLLM's "awq_marlin",
            "gptq_marlin"). None reads it from the file.

    Raises:
        CheckpointError: if it cannot be loaded, or `quantization` disagrees with the file.
    """
    source = _open(Path(path))
    check_requested(quantization, source.quantization, str(path))
    return source


def _open(path: Path) -> WeightSource:
    if path.name.endswith(".partial"):
        raise CheckpointError(f"{path} is an export that was not finished; write it again")
    if path.is_dir():
        gguf = None if any(path.glob("*.safetensors")) else find_gguf(path)
        return GGUFSource(gguf) if gguf else SafetensorsSource(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.suffix == ".gguf":
        return GGUFSource(path)
    if path.suffix in (".bin", ".pt", ".pth"):
        raise CheckpointError(f"{path} is a pickle that can run code when loaded, so it is never read; use safetensors")
    raise CheckpointError(f"{path} is a file; give a model folder or a .gguf file")
