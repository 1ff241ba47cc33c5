"""What makes two runs the same run: the files that were read, and the machine that computed.

Invariant: a run that goes on with files of another size or time is noticed without reading them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_PART = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")
_READ = (".safetensors", ".gguf", ".json")


def model_identity(model: Path) -> list[list[Any]]:
    """Names, sizes and times of a model's files: enough to notice another model."""
    files = [(file.name, file.stat()) for file in _files(model) if file.suffix in _READ]
    return [[name, status.st_size, status.st_mtime_ns] for name, status in files]


def machine(device: torch.device) -> dict[str, Any]:
    """What the last bits of sums depend on, by name."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    return {"device": device.type, "torch": torch.__version__, "threads": torch.get_num_threads()}


def model_name(model: Path) -> str:
    """What a model is called: its folder, its file without ".gguf", or the repository whose snapshot it is."""
    path = model.absolute()
    path = path.resolve() if path.name in ("", "..") else path
    if path.suffix == ".gguf":
        part = _PART.fullmatch(path.name)
        return part[1] if part else path.stem
    is_snapshot = path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--")
    return path.parent.parent.name.rpartition("--")[2] if is_snapshot else path.name


def _files(model: Path) -> Sequence[Path]:
    """A folder's files; a file, with the other parts of the model where it is one of several."""
    if model.is_dir():
        return sorted(model.iterdir())
    own = _PART.fullmatch(model.name)
    if own is None:
        return [model]
    parts = ((file, _PART.fullmatch(file.name)) for file in sorted(model.parent.iterdir()))
    return [file for file, part in parts if part is not None and part.groups() == own.groups()]
