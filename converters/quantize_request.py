"""What a quantization was asked for: defaults filled in, contradictions refused before anything is read or written.

Invariant: a request that exists can be expressed by its format for every linear of the model that `check_model` has
seen. Nothing here needs weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import gcd
from typing import Any

import torch

from converters.errors import CheckpointError
from converters.export_tensors import MULTIPLES, ExportFormat, ExportScheme
from converters.layers import is_skipped
from converters.quantizers import Method, QuantSettings
from converters.skeleton import HEAD, Skeleton
from converters.source import LinearSlot

FORMATS: tuple[ExportFormat, ...] = ("awq", "gptq", "compressed-tensors")
#: Format and symmetry of each method where they are not given: what other programs know such a model as.
_DEFAULTS: Mapping[str, tuple[ExportFormat, bool]] = {
    "awq": ("awq", False),
    "gptq": ("gptq", True),
    "rtn": ("awq", False),
    "auto": ("awq", False),
}
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


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

    def settings(self, dense_dtype: torch.dtype) -> QuantSettings:
        """The same for a quantizer."""
        return QuantSettings(
            Method(self.method),
            bits=self.bits,
            group_size=self.group_size,
            sym=self.sym,
            act_order=self.act_order,
            min_zero=1 if self.format == "gptq" else 0,
            dense_dtype=dense_dtype,
        )

    def scheme(self, *, has_order: bool) -> ExportScheme:
        """What the config will say."""
        return ExportScheme(self.format, self.bits, self.group_size, self.sym, has_order)

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
        raise CheckpointError(f"group size is {group_size}, expected -1 (one group) or a multiple of 8 such as 128")
    own_format, own_sym = _DEFAULTS[method]
    if format is None:
        # AWQ's format has four bits and natural order; GPTQ's has room for both.
        format = "gptq" if own_format == "awq" and (bits == 8 or act_order or lm_head) else own_format
    chosen = next((known for known in FORMATS if known == format), None)
    if chosen is None:
        hint = "; qengine convert writes dense" if format == "dense" else ""
        raise CheckpointError(f"format '{format}' is not known; known: {', '.join(FORMATS)}{hint}")
    if chosen == "awq":
        _check_awq(bits=bits, act_order=act_order, lm_head=lm_head)
    if act_order and method in ("rtn", "awq"):
        raise CheckpointError(f"an activation order comes of gptq or auto, not of {method}; leave it out")
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


def check_model(request: QuantRequest, skeleton: Skeleton) -> tuple[LinearSlot, ...]:
    """The linears that will be quantized, in the order of the model.

    Raises:
        CheckpointError: if the format cannot express one of them, or none is left.
    """
    pattern = request.skip_pattern
    linears = [slot for slot in skeleton.slots(tied=False) if isinstance(slot, LinearSlot)]
    wanted = [slot for slot in linears if slot.name != HEAD or request.lm_head]
    chosen = tuple(slot for slot in wanted if slot.name == HEAD or not is_skipped(slot.name, pattern))
    if not chosen:
        raise CheckpointError(f"skip '{request.skip}' leaves no linear to quantize")
    rows, columns = MULTIPLES[request.format]
    for slot in chosen:
        if slot.in_features % rows or slot.out_features % columns:
            raise CheckpointError(
                f"{slot.name} has {slot.in_features} inputs and {slot.out_features} outputs; {request.format} packs "
                f"multiples of {rows} and {columns}. Skip it (--skip), or choose another format"
            )
    if request.format != "gptq" and request.group_size != -1:
        _check_groups(request, chosen)
    return chosen


def _check_groups(request: QuantRequest, linears: Iterable[LinearSlot]) -> None:
    sizes = {slot.in_features: slot.name for slot in reversed(tuple(linears))}
    bad = {size: name for size, name in sizes.items() if size % request.group_size}
    if not bad:
        return
    common = gcd(*sizes)
    fitting = next((size for size in (128, 64, 32, 16) if size < request.group_size and common % size == 0), -1)
    size, name = next(iter(bad.items()))
    raise CheckpointError(
        f"{name} has {size} inputs, which are not whole groups of {request.group_size}, as {request.format} needs "
        f"them; --group-size {fitting} fits all linears"
    )


def dense_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The type of what is not quantized: the config's if it has 16 bits, else float16."""
    said = config.get("dtype") or config.get("torch_dtype")
    return _DTYPES.get(said, torch.float16) if isinstance(said, str) else torch.float16
