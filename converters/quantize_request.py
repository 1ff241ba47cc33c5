"""What a quantization was asked for: defaults filled in, contradictions refused before anything is read or written.

Invariant: a request that exists does not contradict itself; whether it fits a model is `quantize_fit`'s question.
Without torch, so that a command can refuse its options at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from converters.errors import CheckpointError
from converters.export_formats import ExportFormat

FORMATS: tuple[ExportFormat, ...] = ("awq", "gptq", "compressed-tensors")
#: Format and symmetry of each method where they are not given: what other programs know such a model as.
_DEFAULTS: Mapping[str, tuple[ExportFormat, bool]] = {
    "awq": ("awq", False),
    "gptq": ("gptq", True),
    "rtn": ("awq", False),
    "auto": ("awq", False),
}


@dataclass(frozen=True, slots=True)
class QuantRequest:
    """A request without open questions; see `make_request`."""

    method: str
    bits: int
    group_size: int
    sym: bool
    act_order: bool
    format: ExportFormat
    skip: str | None
    lm_head: bool

    @property
    def needs_calibration(self) -> bool:
        """Rounding looks at weights alone."""
        return self.method != "rtn"

    @property
    def skip_pattern(self) -> re.Pattern[str] | None:
        """Full names of modules in which it is found stay dense."""
        return None if self.skip is None else re.compile(self.skip)

    def as_json(self) -> dict[str, Any]:
        """By name."""
        return asdict(self)


def make_request(
    *,
    method: str = "gptq",
    bits: int = 4,
    group_size: int = 128,
    sym: bool | None = None,
    act_order: bool = False,
    format: str | None = None,
    skip: str | None = None,
    lm_head: bool = False,
) -> QuantRequest:
    """Fill in defaults and refuse what contradicts itself.

    Raises:
        CheckpointError: with the value, and what is possible.
    """
    if method not in _DEFAULTS:
        raise CheckpointError(f"method '{method}' is not known; known: {', '.join(_DEFAULTS)}")
    if bits not in (4, 8):
        raise CheckpointError(f"bits is {bits}, expected 4 or 8")
    if group_size != -1 and (group_size < 8 or group_size % 8):
        raise CheckpointError(f"group_size is {group_size}, expected -1 (one group) or a multiple of 8 such as 128")
    own_format, own_sym = _DEFAULTS[method]
    if act_order and method in ("rtn", "awq"):
        raise CheckpointError(f"an activation order comes of gptq or auto, not of {method}; leave it out")
    # An order says which inputs share a scale; with one group they all do.
    act_order = act_order and group_size != -1
    if format is None:
        # AWQ's format has four bits and natural order; GPTQ's has room for both.
        format = "gptq" if own_format == "awq" and (bits == 8 or act_order or lm_head) else own_format
    chosen = next((known for known in FORMATS if known == format), None)
    if chosen is None:
        hint = "; qengine convert writes dense" if format == "dense" else ""
        raise CheckpointError(f"format '{format}' is not known; known: {', '.join(FORMATS)}{hint}")
    if chosen == "awq":
        _check_awq(bits=bits, act_order=act_order, lm_head=lm_head)
    if skip is not None:
        try:
            re.compile(skip)
        except re.error as error:
            raise CheckpointError(f"skip '{skip}' is no regular expression: {error}") from error
    return QuantRequest(method, bits, group_size, own_sym if sym is None else sym, act_order, chosen, skip, lm_head)


def _check_awq(*, bits: int, act_order: bool, lm_head: bool) -> None:
    faults = [
        (bits != 4, f"{bits} bits"),
        (act_order, "an activation order"),
        (lm_head, "a quantized head"),
    ]
    for is_fault, what in faults:
        if is_fault:
            raise CheckpointError(f"format awq cannot express {what}; choose gptq or compressed-tensors")
