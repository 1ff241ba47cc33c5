"""What `quantize` and `convert` were asked to do, checked before torch is loaded.

Invariant: settings that exist do not contradict themselves; whether they fit the model is the command's question.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from converters.errors import CheckpointError
from converters.export_formats import EXPORT_FORMATS, ExportFormat
from converters.quantize_request import QuantRequest, make_request
from qengine.commands.parsing import Invocation
from qengine.config import DEMO, nearest
from qengine.errors import ConfigError

_REQUEST = ("method", "bits", "group_size", "act_order", "format", "skip", "lm_head")
_DTYPES = ("float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class QuantizeSettings:
    """`model` is None for the bundled one; `sym` None for what the method's format usually has."""

    model: str | None
    out: str
    request: QuantRequest
    calibration: str = "builtin"
    num_samples: int = 128
    seq_len: int = 2048
    device: str = "auto"
    resume: bool = False
    evaluate: bool = False


@dataclass(frozen=True, slots=True)
class ConvertSettings:
    """`model` is None for the bundled one; `dtype` None keeps what is not quantized as it is."""

    model: str | None
    out: str
    format: ExportFormat
    dtype: str | None = None


def quantize_settings(given: Invocation) -> QuantizeSettings:
    """Raises ConfigError."""
    options = given.options
    if options.get("sym") and options.get("asym"):
        raise ConfigError("--sym and --asym contradict each other; give one of them")
    sym = True if options.get("sym") else False if options.get("asym") else None
    try:
        request = make_request(**{name: options[name] for name in _REQUEST if name in options}, sym=sym)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    for name in ("num_samples", "seq_len"):
        if options.get(name, 1) < 1:
            raise ConfigError(f"{name} is {options[name]}, expected at least 1")
    names = ("calibration", "num_samples", "seq_len", "device", "resume", "evaluate")
    return QuantizeSettings(
        _model(options), options["out"], request, **{name: options[name] for name in names if name in options}
    )


def convert_settings(given: Invocation) -> ConvertSettings:
    """Raises ConfigError."""
    options = given.options
    wanted = options.get("format")
    chosen = next((known for known in EXPORT_FORMATS if known == wanted), None)
    if chosen is None:
        known = ", ".join(EXPORT_FORMATS)
        if wanted is None:
            raise ConfigError(f"--format is missing; give one of {known}")
        raise ConfigError(f"--format '{wanted}' is not known{nearest(wanted, EXPORT_FORMATS)} (known: {known})")
    dtype = options.get("dtype")
    dtype = {"half": "float16"}.get(dtype, dtype) if dtype is not None else None
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"--dtype '{dtype}' is not known (known: {', '.join(_DTYPES)})")
    return ConvertSettings(_model(options), options["out"], chosen, dtype)


def _model(options: Any) -> str | None:
    model: str = options["model"]
    return None if model == DEMO else model
