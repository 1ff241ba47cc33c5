"""`qengine convert`: a checkpoint in another format, without quantizing it again.

Invariant: what the format cannot express is refused before anything is written. Exit codes: 0 written; 1 the disk;
2 the model, or the request.
"""

from __future__ import annotations

import sys

from converters.convert import convert
from qengine.commands.making import find_model, making_errors, shown_name
from qengine.commands.quantize_settings import ConvertSettings


def run(settings: ConvertSettings) -> int:
    """Returns the exit code. Raises ConfigError, LoadError or QEngineError."""
    location = find_model(settings.model)
    with making_errors():
        done = convert(
            location.path,
            settings.out,
            settings.format,
            name=shown_name(location),
            dtype=settings.dtype,
            show_progress=sys.stderr.isatty(),
        )
    linears = f"{done.num_packed} quantized linears" if done.num_packed else f"{done.num_dense} linears"
    print(f"wrote {done.out}: {done.description}, {linears}, {done.num_bytes / 1e6:.1f} MB of weights")
    print(f"run it: qengine serve {done.out}")
    return 0
