"""The `qengine` command: finds the command, checks its options, loads what it needs, and turns errors into exit codes.

Exit codes: 0 done, 1 failed while running, 2 wrong options or a model that cannot be loaded, 130 Ctrl-C, 141 the
reader of a pipe left. Invariant: a user sees one line per error, a traceback only with --debug; --help and every
refused option answer before torch is loaded, because a command's module is imported here and only when it runs.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qengine import __version__, environment
from qengine.commands.bench_settings import bench_offline_settings, bench_serve_settings
from qengine.commands.flags import COMMANDS, Flag
from qengine.commands.parsing import Invocation, help_text, overview, parse
from qengine.commands.quantize_settings import convert_settings, quantize_settings
from qengine.commands.settings import (
    chat_settings,
    evaluate_settings,
    generate_settings,
    inspect_settings,
    plan_settings,
    serve_settings,
)
from qengine.config import nearest
from qengine.errors import ConfigError, DoesNotFitError, LoadError, QEngineError, RequestError
from qengine.imports import import_late
from qengine.interrupts import EXIT_INTERRUPTED, raise_as_usual
from qengine.logs import harmless, set_up_logging

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_BROKEN_PIPE = 141


@dataclass(frozen=True, slots=True)
class _Command:
    """`check` makes the settings and is light; `module` is heavy, and its `run(settings)` returns the exit code."""

    check: Callable[[Invocation], Any]
    module: str
    log_level: str


#: The one table of late imports. Commands that own the terminal say less about how they start.
_RUNNERS = {
    "serve": _Command(serve_settings, "qengine.commands.serve", "info"),
    "generate": _Command(generate_settings, "qengine.commands.generate", "warning"),
    "chat": _Command(chat_settings, "qengine.commands.chat", "warning"),
    "inspect": _Command(inspect_settings, "qengine.commands.inspect", "warning"),
    "plan": _Command(plan_settings, "qengine.commands.plan", "warning"),
    "quantize": _Command(quantize_settings, "qengine.commands.quantize", "warning"),
    "convert": _Command(convert_settings, "qengine.commands.convert", "warning"),
    "evaluate": _Command(evaluate_settings, "qengine.commands.evaluate", "warning"),
    "bench serve": _Command(bench_serve_settings, "qengine.commands.bench_serve", "warning"),
    "bench offline": _Command(bench_offline_settings, "qengine.commands.bench_offline", "warning"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    _make_output_forgiving()
    try:
        code = _run(words, debug)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _silence_output()
        return EXIT_BROKEN_PIPE
    except DoesNotFitError as error:
        code = _fail(_with_flag_names(error.summary), EXIT_USAGE, debug)
        print(f"\n{harmless(error.table)}", file=sys.stderr)
        return code
    except (ConfigError, LoadError, RequestError) as error:
        return _fail(_with_flag_names(str(error)), EXIT_USAGE, debug)
    except QEngineError as error:
        return _fail(str(error), EXIT_FAILED, debug)
    except Exception as error:  # noqa: BLE001 - the last place that can turn our own bug into a readable line
        hint = "" if debug else " (--debug shows where)"
        return _fail(f"internal error: {type(error).__name__}: {error}{hint}", EXIT_FAILED, debug)


def _run(words: list[str], debug: bool) -> int:
    while words and words[0] == "--debug":
        words.pop(0)
    if not words or words[0] in ("-h", "--help", "help"):
        return _print_help(words[1:])
    if words[0] in ("--version", "-V"):
        print(f"qengine {__version__}")
        return 0
    name, rest = _split_command(words)
    command = _RUNNERS.get(name)
    if command is None:
        if rest and _asks_for_help(rest):
            return _print_help([name])
        kind = "flag" if name.startswith("-") else "command"
        known = [*_RUNNERS, "--help", "--version"]
        raise ConfigError(f"unknown {kind} '{name}'{nearest(name, known)} (commands: {', '.join(_RUNNERS)})")
    if _asks_for_help(rest):
        return _print_help([name])
    set_up_logging("debug" if debug else environment.log_level(default=command.log_level))
    settings = command.check(parse(name, rest))
    run: Callable[[Any], int] = import_late(command.module).run
    raise_as_usual()
    return run(settings)


def _split_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """The command, which may be of two words, and what follows it."""
    num_words = 2 if any(name.startswith(f"{words[0]} ") for name in _RUNNERS) and len(words) > 1 else 1
    if num_words == 2 and words[1].startswith("-"):
        num_words = 1
    return " ".join(words[:num_words]), list(words[num_words:])


def _asks_for_help(words: Sequence[str]) -> bool:
    before = words[: words.index("--")] if "--" in words else words
    return "--help" in before or "-h" in before


def _print_help(command: Sequence[str]) -> int:
    name = _split_command(command)[0] if command else ""
    if name in COMMANDS:
        text = help_text(name, shutil.get_terminal_size((100, 40)).columns)
    else:
        text = overview()
    sys.stdout.write(text)
    return 0


# Errors

#: Of a message; more of it would hide the rest, as where a file has a name of a megabyte.
_MOST_CHARS = 4000


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    message = message if len(message) <= _MOST_CHARS else message[:_MOST_CHARS] + "..."
    text = "error: " + harmless(" ".join(message.splitlines()))
    if sys.stderr.isatty() and not environment.no_color():
        text = f"\033[31m{text}\033[0m"
    print(text, file=sys.stderr)
    return code


def _all_flags() -> dict[str, Flag]:
    return {dest: flag for described in COMMANDS.values() for dest, flag in described.flags.items()}


def _with_flag_names(message: str) -> str:
    """The same message with flags in place of Python's option names: "max_model_len is 0" is about --max-model-len."""
    flags = _all_flags()
    names = "|".join(sorted((re.escape(name) for name in flags if "_" in name), key=len, reverse=True))
    message = re.sub(rf"(?<![\w./-])({names})(?![\w./])", lambda m: flags[m[1]].name, message)
    first, _, rest = message.partition(" ")
    return f"{flags[first].name} {rest}" if first in flags and rest.startswith(("is ", "'")) else message


# Output


def _make_output_forgiving() -> None:
    """A terminal that cannot show a character shows a question mark instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def _silence_output() -> None:
    """The reader left: what is still buffered must not raise again when Python exits."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        logging.getLogger(__name__).debug("standard output has no file to silence")
