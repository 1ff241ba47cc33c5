"""Whether a format can express what was asked for, for every linear of a model; and the request as quantizers take it.

Invariant: what `check_model` lets pass can be written, whatever the weights are. It reads none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import gcd
from typing import Any

import torch

from converters.errors import CheckpointError
from converters.export_formats import MULTIPLES
from converters.export_tensors import ExportScheme
from converters.layers import is_skipped
from converters.quantize_request import QuantRequest
from converters.quantizers import Method, QuantSettings
from converters.skeleton import HEAD, Skeleton
from converters.source import LinearSlot

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def quantizer_settings(request: QuantRequest, dense_dtype: torch.dtype) -> QuantSettings:
    """The request for a quantizer; GPTQ's first version stores zero points less one, so that none may be 0."""
    return QuantSettings(
        Method(request.method),
        bits=request.bits,
        group_size=request.group_size,
        sym=request.sym,
        act_order=request.act_order,
        min_zero=1 if request.format == "gptq" else 0,
        dense_dtype=dense_dtype,
    )


def export_scheme(request: QuantRequest, *, has_order: bool) -> ExportScheme:
    """What the config will say."""
    return ExportScheme(request.format, request.bits, request.group_size, request.sym, has_order)


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
