"""The way in: a path to an opened WeightSource, whatever the format.

Invariant: only headers and small JSON files are read here; what is not supported, or not what was asked for, is refused
with the reason. A file's first bytes decide what it is, not its name.
"""

from __future__ import annotations

import os

from converters.gguf_source import GGUFSource
from converters.open_headers import Openers, open_with
from converters.safetensors_source import SafetensorsSource
from converters.source import WeightSource


def open_checkpoint(path: str | os.PathLike[str], quantization: str | None = None) -> WeightSource:
    """Open a folder of safetensors, a GGUF file, or a folder that holds one GGUF model.

    Args:
        quantization: what the caller believes the file to be: "awq", "gptq", "compressed-tensors", "gguf" (or
            "awq_marlin" and "gptq_marlin", which mean the same as the first two). None takes the file as it is.

    Raises:
        CheckpointError: if it cannot be loaded, or `quantization` disagrees with the file.
    """
    openers: Openers[WeightSource] = Openers(SafetensorsSource.open, GGUFSource)
    return open_with(openers, path, quantization)
