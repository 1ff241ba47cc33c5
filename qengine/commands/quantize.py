"""`qengine quantize`: says what it needs, makes the checkpoint layer by layer, and shows what it cost.

Invariant: whatever ends it early says how to go on. Exit codes: 0 written; 1 the disk, or a layer that cannot be
quantized; 2 the model, the calibration or the request; 130 Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from converters.export_files import add_section
from converters.export_folder import WORK
from converters.gguf_source import GGUFSource
from converters.quantize import quantize
from converters.quantize_outcome import Observer, Preview, Quantized, minutes, plan_lines, result_lines
from converters.quantize_state import num_finished
from converters.quantizers import LinearReport
from converters.source import WeightSource
from qengine.commands.evaluate import as_text
from qengine.commands.making import find_model, making_errors, shown_name
from qengine.commands.quantize_settings import QuantizeSettings
from qengine.evaluation import evaluate
from qengine.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf


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
                open_encoder=_open_tokenizer,
                observer=shown,
                show_progress=sys.stderr.isatty(),
            )
    except BaseException:
        partial = Path(f"{settings.out.rstrip('/')}.partial")
        # What is on the disk counts: a layer may have been saved just before, and not been announced.
        finished = max(shown.num_finished, num_finished(partial / WORK))
        if finished and partial.is_dir():
            done_so_far = f"{finished} of {shown.num_parts} layers are done and kept in {partial}"
            print(f"\n{done_so_far}; the same command with --resume goes on with them", file=sys.stderr)
        raise
    print("\n".join([*result_lines(done), f"run it: qengine serve {done.out}"]))
    if settings.evaluate:
        _evaluate(done, location.path, settings.device)
    return 0


def _open_tokenizer(source: WeightSource, path: Path) -> Tokenizer:
    """The model's own, as the engine runs it: its template is a stranger's program, and here it has bounds."""
    return tokenizer_from_gguf(source.metadata) if isinstance(source, GGUFSource) else load_tokenizer(str(path))


def _evaluate(done: Quantized, original: Path, device: str) -> None:
    """Measure the result against the original, show it, and add it to the card."""
    print("\nmeasuring the result against the original; what is written is complete", flush=True)
    kind, _, index = device.partition(":")
    # The engine takes the current one of several GPUs.
    with torch.cuda.device(int(index)) if index and kind == "cuda" else nullcontext():
        found = evaluate(str(done.out), against=str(original), device=kind, show_progress=sys.stderr.isatty())
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
        print("\n".join(plan_lines(self._title, preview)), flush=True)

    def finished(self, part: int, num_parts: int, report: Sequence[LinearReport], seconds: float) -> None:
        self.num_finished = part + 1
        if not sys.stderr.isatty():
            # A bar would fill a log with copies of itself.
            left = seconds / (part + 1) * (num_parts - part - 1)
            print(f"  layer {part + 1} of {num_parts} is done, about {minutes(left)} left", flush=True)
