"""What a quantization tells its caller, before, meanwhile and at the end; and how a command says it.

Invariant: nothing here prints; the lines are the same whoever shows them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from converters.calibrate import CalibrationSet
from converters.quantize_memory import MemoryPlan
from converters.quantize_report import notes
from converters.quantize_request import QuantRequest
from converters.quantizers import LinearReport

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Quantized:
    """What came of it.

    Attributes:
        out: the folder.
        report: a line for each linear.
        seconds: over all runs.
        num_bytes: of the weights.
        planned: memory as predicted.
        host_bytes, device_bytes: memory as measured.
        calibration: name, samples and tokens; None if none was needed.
    """

    out: Path
    report: tuple[LinearReport, ...]
    seconds: float
    num_bytes: int
    planned: MemoryPlan
    host_bytes: int
    device_bytes: int
    calibration: CalibrationSet | None


@dataclass(frozen=True, slots=True)
class Preview:
    """What is known before the work begins, for whoever wants to say it."""

    request: QuantRequest
    description: str
    num_layers: int
    num_linears: int
    num_finished: int
    calibration: CalibrationSet | None
    memory: MemoryPlan
    device: torch.device


class Observer:
    """What a caller is told meanwhile; the methods do nothing."""

    def begins(self, preview: Preview) -> None:
        """Before the first layer is loaded."""

    def finished(self, part: int, num_parts: int, report: Sequence[LinearReport], seconds: float) -> None:
        """After each layer, whose state is saved."""


def plan_lines(title: str, preview: Preview) -> list[str]:
    """What will be made of what, and what that takes."""
    request, memory = preview.request, preview.memory
    group = "one group" if request.group_size == -1 else f"group {request.group_size}"
    kind = "symmetric" if request.sym else "asymmetric"
    order = ", activation order" if request.act_order else ""
    rows = [
        ("from", preview.description),
        ("to", f"{request.format}, {request.bits}-bit, {group}, {kind}{order}, by {request.method}"),
        ("layers", f"{preview.num_layers} with {preview.num_linears} linears, on {preview.device}"),
    ]
    if preview.num_finished:
        rows.append(("resumed", f"{preview.num_finished} layers are done already"))
    if preview.calibration is not None:
        texts = preview.calibration
        rows.append(("reads", f"{texts.name}: {len(texts.samples)} samples, {texts.num_tokens} tokens"))
    needs = f"{memory.host / _GIB:.2f} GiB of memory"
    if memory.device:
        needs += f", {memory.device / _GIB:.2f} GiB on the GPU"
    rows.append(("needs", f"{needs}, {memory.disk / _GIB:.2f} GiB of disk meanwhile"))
    return [title, *(f"  {label:<8} {text}" for label, text in rows)]


def result_lines(done: Quantized) -> list[str]:
    """Errors by kind of linear, what was noted, what it took."""
    kinds: dict[str, list[LinearReport]] = {}
    for line in done.report:
        kinds.setdefault(line.name.rpartition(".")[2], []).append(line)
    lines = [""]
    if any(not math.isnan(line.error) for line in done.report):
        lines += [f"{'linear':<12} {'mean error':>11} {'rounding':>11} {'worst':>11}  where", "-" * 62]
        for kind, reports in kinds.items():
            worst = max(reports, key=lambda line: line.error)
            mean = sum(line.error for line in reports) / len(reports)
            plain = sum(line.rtn_error for line in reports) / len(reports)
            lines.append(f"{kind:<12} {mean:>11.2e} {plain:>11.2e} {worst.error:>11.2e}  {worst.name}")
        lines += ["", "errors: of a linear's output on the calibration, mean square over that of the output"]
    lines += notes(done.report)
    took = f"{done.host_bytes / _GIB:.2f} GiB of memory ({done.planned.host / _GIB:.2f} foreseen)"
    if done.device_bytes:
        took += f", {done.device_bytes / _GIB:.2f} GiB on the GPU ({done.planned.device / _GIB:.2f} foreseen)"
    lines.append(f"took {minutes(done.seconds)}, {took}")
    lines.append(f"wrote {done.out}: {done.num_bytes / 1e6:.1f} MB of weights")
    return lines


def minutes(seconds: float) -> str:
    """A time that somebody waits."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
