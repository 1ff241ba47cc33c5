"""The one door to the errors of the `tokenizers` library.

Invariant: whatever the Rust side raises, a panic (a BaseException) included, leaves as one of qengine's own errors.
It does not catch KeyboardInterrupt, SystemExit or errors that are qengine's already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qengine.errors import QEngineError

MAX_REASON_LEN = 300


@contextmanager
def library_errors(make_error: Callable[[str], QEngineError]) -> Iterator[None]:
    """Turn a failure of the library into `make_error(reason)`; the reason is its message, shortened."""
    try:
        yield
    except QEngineError:
        raise
    except BaseException as error:
        # A Rust panic is a pyo3_runtime.PanicException, which derives from BaseException and cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise make_error(shorten(str(error) or type(error).__name__)) from error


def shorten(text: str) -> str:
    """`text` on one line, cut at MAX_REASON_LEN characters."""
    line = " ".join(text[: 4 * MAX_REASON_LEN].split())
    return line if len(line) <= MAX_REASON_LEN else line[: MAX_REASON_LEN - 3] + "..."
