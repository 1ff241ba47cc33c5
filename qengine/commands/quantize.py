"""`qengine quantize`: says what it needs, makes the checkpoint layer by layer, and shows what it cost.

Invariant: whatever ends it early says how to go on. Exit codes: 0 written; 1 the disk, or a layer that cannot be
quantized; 2 the model, the calibration or the request; 130 Ctrl-C.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from converters.export_files import add_section
from converters.quantize import Observer, Preview, Quantized, quantize
from converters.quantize_report import notes
from converters.quantizers import LinearReport
from qengine.commands.evaluate import as_text
from qengine.commands.making import find_model, making_errors, shown_name
from qengine.commands.quantize_settings import QuantizeSettings
from qengine.evaluation import evaluate

_GIB = 2**30


def run(settings: QuantizeSettings) -> int:
    """Returns the exit code. Raises ConfigError, LoadError or QEngineError."""
    location = find_model(settings.model)
    name = shown_name(location)
    asked = settings.request
    shown = _Shown(f"{name} -> {settings.out}")
    try:
        with making_errors():
            done = quantize(
                location.path,
                settings.out,
                **asked.as_json(),
                calibration=settings.calibration,
                num_samples=settings.num_samples,
                seq_len=settings.seq_len,
                device=settings.device,
                resume=settings.resume,
                name=name,
                observer=shown,
                show_progress=sys.stderr.isatty(),
            )
    except BaseException:
        partial = f"{settings.out.rstrip('/')}.partial"
        if shown.num_finished and os.path.isdir(partial):
            done_so_far = f"{shown.num_finished} of {shown.num_parts} layers are done and kept in {partial}"
            print(f"\n{done_so_far}; the same command with --resume goes on with them", file=sys.stderr)
        raise
    print("\n".join(_table(done)))
    if settings.evaluate:
        _evaluate(done, location.path, settings.device)
    return 0


def _evaluate(done: Quantized, original: Path, device: str) -> None:
    """Measure the result against the original, show it, and add it to the card."""
    print("\nmeasuring the result against the original; what is written is complete", flush=True)
    found = evaluate(
        str(done.out), against=str(original), device=device.partition(":")[0], show_progress=sys.stderr.isatty()
    )
    print(as_text(found))
    with making_errors():
        add_section(done.out, f"## Quality\n\n{found.as_markdown()}")


class _Shown(Observer):
    """Prints the plan, and counts what is done."""

    def __init__(self, title: str) -> None:
        self._title = title
        self.num_finished = 0
        self.num_parts = 0

    def begins(self, preview: Preview) -> None:
        self.num_finished = preview.num_finished
        self.num_parts = preview.num_layers + preview.request.lm_head
        print("\n".join(_plan(self._title, preview)), flush=True)

    def finished(self, part: int, num_parts: int, report: Sequence[LinearReport], seconds: float) -> None:
        self.num_finished = part + 1
        if not sys.stderr.isatty():
            # A bar would fill a log with copies of itself.
            left = seconds / (part + 1) * (num_parts - part - 1)
            print(f"  layer {part + 1} of {num_parts} is done, about {_minutes(left)} left", flush=True)


def _plan(title: str, preview: Preview) -> list[str]:
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


def _table(done: Quantized) -> list[str]:
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
    lines.append(f"took {_minutes(done.seconds)}, {took}")
    lines.append(f"wrote {done.out}: {done.num_bytes / 1e6:.1f} MB of weights")
    lines.append(f"run it: qengine serve {done.out}")
    return lines


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
