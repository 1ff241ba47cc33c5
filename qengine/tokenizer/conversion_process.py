"""The other side of `conversion`: a process in which transformers makes a tokenizer.json of a folder, and ends.

Invariant: before transformers is imported an alarm is set that ends it after a while, even if nobody waits any more,
and from the conversion on its memory (on Linux), processor time and files are bounded. It says on its stderr, last, why
it failed. It reads the folder and writes one file; it does not know what model that is for, nor judge what comes of it.
"""

from __future__ import annotations

import math
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import tokenizers

from qengine.errors import ConfigError, LoadError
from qengine.imports import import_late
from qengine.process_end import exit_now
from qengine.tokenizer.conversion import NO_MEMORY, NO_PACKAGE
from qengine.tokenizer.rust_errors import library_errors
from qengine.tokenizer.tokenizer_json import MAX_TOKENIZER_BYTES


def main(root: str, folder: str, target: str, memory_bytes: int, processor_seconds: int, seconds: float) -> NoReturn:
    """Write the tokenizer of `folder`, a copy of files of `root`, to `target`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Nobody handles this signal, so it ends the process wherever it is.
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        auto = import_late("transformers", needed_for=f"converting the tokenizer of {root}").AutoTokenizer
    except ConfigError as error:
        _fail(str(error), NO_PACKAGE)
    with suppress(ConfigError):
        # Before the bounds are set: it may reserve more than they allow.
        import_late("torch", needed_for="some of transformers")
    _bound(memory_bytes, processor_seconds)
    try:
        with library_errors(LoadError):
            text = _converted(auto, folder)
            # Only here: while the error is handled, what has used up the memory is still there.
            if text is None:
                _fail("there is not enough memory", NO_MEMORY)
            Path(target).write_text(text, encoding="utf-8")
    except LoadError as error:
        _fail(str(error))
    exit_now(0)


def _bound(memory_bytes: int, processor_seconds: int) -> None:
    """Bound what is used from now on; an import of torch alone reserves between one and many GB."""
    if sys.platform == "linux":  # Elsewhere a process cannot say what it has reserved.
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _lower(resource.RLIMIT_AS, pages * resource.getpagesize() + memory_bytes)
    # One second more: at the hard limit the signal would not say which limit it was.
    _lower(resource.RLIMIT_CPU, math.ceil(time.process_time()) + processor_seconds, more=1)
    _lower(resource.RLIMIT_FSIZE, MAX_TOKENIZER_BYTES)
    _lower(resource.RLIMIT_CORE, 0)


def _lower(what: int, limit: int, *, more: int = 0) -> None:
    """Set a limit, and a hard one that is so much higher, unless lower ones are set already."""
    given = [value for value in resource.getrlimit(what) if value != resource.RLIM_INFINITY]
    resource.setrlimit(what, (min([limit, *given]), min([limit + more, *given])))


def _converted(auto: Any, folder: str) -> str | None:
    """The text of tokenizer.json; None if the memory was used up."""
    with suppress(MemoryError):
        # An explicit False: unset, transformers may ask on the terminal whether to run the folder's code.
        slow = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        backend = getattr(slow, "backend_tokenizer", None)
        if not isinstance(backend, tokenizers.Tokenizer):
            raise LoadError(f"{type(slow).__name__} has no fast form")
        return backend.to_str()
    return None


def _fail(reason: str, code: int = 1) -> NoReturn:
    sys.stderr.write(f"\n{' '.join(reason.split())}\n")
    exit_now(code)


if __name__ == "__main__":
    _root, _folder, _target, _memory_bytes, _processor_seconds, _seconds = sys.argv[1:]
    main(_root, _folder, _target, int(_memory_bytes), int(_processor_seconds), float(_seconds))
