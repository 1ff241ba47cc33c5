"""`qengine bench offline`: what the engine does alone, for one model on this machine."""

from __future__ import annotations

import json
import sys

from qengine.bench.offline import measure
from qengine.commands.bench_settings import BenchOfflineSettings
from qengine.engine import Engine


def run(settings: BenchOfflineSettings) -> int:
    """Measure, print, and write the JSON. Returns the exit code. Raises QEngineError."""
    engine = Engine.start(settings.engine, show_progress=sys.stderr.isatty())
    try:
        info = engine.info
        print(f"{info.model} ({info.description}), {info.dtype} on {info.device}")
        figures = measure(
            engine,
            batches=settings.batches,
            input_len=settings.input_len,
            output_len=settings.output_len,
            num_runs=settings.num_runs,
            say=lambda line: print(line, flush=True),
        )
    finally:
        engine.shutdown()
    if settings.json_file is not None:
        lengths = {"input_len": settings.input_len, "output_len": settings.output_len}
        record = {"model": info.model, "device": info.device, "dtype": info.dtype, **lengths, **figures}
        settings.json_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0
