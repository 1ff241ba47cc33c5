"""From argv to checked option values, and the help text. Made from the tables in `flags`.

Invariant: nothing given is ignored: an unknown flag, key or word is an error with the nearest valid one, and so is
a flag whose feature this version lacks. argparse only cuts argv into flags; it prints nothing and never exits.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from qengine.commands.flags import COMMANDS, Flag, any_text, text
from qengine.config import nearest
from qengine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Invocation:
    """A command with its options by name; `on_command_line` names those that argv itself gave, not the config file."""

    command: str
    options: Mapping[str, Any]
    on_command_line: frozenset[str] = frozenset()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


class _Several(argparse.Action):
    """Appends all values, and remembers that one flag took more than one of them."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, []), *values])
        if len(values) > 1:
            namespace.greedy_flag = option_string


def parse(command: str, argv: Sequence[str]) -> Invocation:
    """Read a command's flags, and its config file if --config names one.

    Args:
        command: one of COMMANDS.
        argv: what follows the command.

    Raises:
        ConfigError: for anything unknown, malformed or not available.
    """
    flags = COMMANDS[command].flags
    words, literal = _split_at_dashes(argv)
    known, rest = _build(flags).parse_known_args(words)
    given = vars(known)
    greedy: str | None = given.pop("greedy_flag", None)
    named = _words_from(command, flags, rest, literal)
    options = {name: _convert(flags[name], value) for name, value in given.items()}
    options.update(named)
    merged = {**_read_config(options.get("config"), command, flags), **options}
    merged.pop("config", None)
    if greedy is not None and "model" not in merged and _may_be_a_model(greedy, flags):
        raise ConfigError(
            f"{greedy} was given several values and there is no MODEL, so one of them may be meant as the model; "
            f"put MODEL before the flags, or repeat {greedy} for each value"
        )
    return Invocation(command, merged, frozenset(options))


def _may_be_a_model(name: str, flags: Mapping[str, Flag]) -> bool:
    """Whether the values of a flag are such that a model's name among them would go unnoticed."""
    return any(name in flag.names and flag.parse in (text, any_text) for flag in flags.values())


def _split_at_dashes(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What follows a lone -- is never a flag."""
    words = list(argv)
    if "--" not in words:
        return words, []
    cut = words.index("--")
    return words[:cut], words[cut + 1 :]


def _build(flags: Mapping[str, Flag]) -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for flag in flags.values():
        names = (flag.short, flag.name) if flag.short else (flag.name,)
        if flag.kind == "switch":
            parser.add_argument(*names, dest=flag.dest, action="store_true")
        elif flag.kind == "on/off":
            parser.add_argument(flag.name, dest=flag.dest, action=argparse.BooleanOptionalAction)
        elif flag.kind == "value":
            parser.add_argument(*names, dest=flag.dest)
        else:
            parser.add_argument(*names, dest=flag.dest, action=_Several, nargs="+" if flag.kind == "list" else 1)
    return parser


def _words_from(command: str, flags: Mapping[str, Flag], rest: Sequence[str], literal: Sequence[str]) -> dict[str, str]:
    """What stands beside the flags: a MODEL that may be left out, or as many words as the command takes."""
    for word in rest:
        if word.startswith("-") and len(word) > 1:
            raise ConfigError(_unknown_flag(command, flags, word.partition("=")[0]))
    words = [*rest, *literal]
    names = [name for name, _ in COMMANDS[command].words]
    takes = " and ".join(name.upper() for name in names)
    if len(words) > len(names):
        given = " and ".join(repr(w) for w in words)
        raise ConfigError(f"{command} takes {'one MODEL' if len(names) == 1 else takes}, but was given {given}")
    if len(names) > 1 and len(words) < len(names):
        given = f"was given only {words[0]!r}" if words else "was given neither"
        raise ConfigError(f"{command} takes {takes}, but {given} (qengine {command} --help shows examples)")
    for name, word in zip(names, words, strict=False):
        if not word.strip():
            hint = "; give a folder, a .gguf file or a hub id, or leave it out" if len(names) == 1 else ""
            raise ConfigError(f"{name.upper()} is empty{hint}")
    return dict(zip(names, words, strict=False))


def _unknown_flag(command: str, flags: Mapping[str, Flag], word: str) -> str:
    for other, description in COMMANDS.items():
        if any(word in flag.names for flag in description.flags.values()):
            return f"{word} is a flag of 'qengine {other}', not of 'qengine {command}'"
    names = [name for flag in flags.values() if not flag.refused for name in flag.names]
    return f"unknown flag {word}{nearest(word, names)} (qengine {command} --help lists all)"


def _convert(flag: Flag, value: Any) -> Any:
    if flag.refused:
        raise ConfigError(f"{flag.name} is not available: {flag.refused}")
    if isinstance(value, bool):
        return value
    if isinstance(value, list):
        return tuple(flag.parse(item, flag.name) for item in value)
    return flag.parse(value, flag.name)


# The config file


def _read_config(file: str | None, command: str, flags: Mapping[str, Flag]) -> dict[str, Any]:
    if file is None:
        return {}
    options: dict[str, Any] = {}
    for key, value in _load_mapping(file).items():
        name = str(key).lstrip("-").replace("_", "-")
        where = f"{file}: '{key}'"
        if name == "model":
            options["model"] = _file_text(where, value)
            continue
        negated = name.startswith("no-") and name.replace("-", "_") not in flags
        flag = flags.get(name.removeprefix("no-").replace("-", "_") if negated else name.replace("-", "_"))
        if flag is None or flag.dest == "config" or (negated and flag.kind != "on/off"):
            known = [
                n[2:] for f in flags.values() if f.dest != "config" and not f.refused for n in f.names if n[:2] == "--"
            ]
            raise ConfigError(f"{where} is not an option of {command}{nearest(name, [*known, 'model'])}")
        converted = _from_file(flag, where, value)
        options[flag.dest] = not converted if negated else converted
    return options


def _load_mapping(file: str) -> Mapping[Any, Any]:
    path = Path(file).expanduser()
    try:
        content = path.read_text(encoding="utf-8")
        loaded = json.loads(content) if path.suffix == ".json" else yaml.safe_load(content)
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--config {file} is not readable as {'JSON' if path.suffix == '.json' else 'YAML'}: {reason}"
        ) from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"--config {file} holds a {type(loaded).__name__}, expected 'flag: value' lines")
    return loaded


def _from_file(flag: Flag, where: str, value: Any) -> Any:
    """A YAML value as the flag's. Numbers may be numbers; text must be text, lest a key like 0123 changes unnoticed."""
    if flag.kind in ("switch", "on/off"):
        if not isinstance(value, bool):
            raise ConfigError(f"{where} is {value!r}, expected true or false")
        return _convert(flag, value)
    if flag.kind in ("list", "repeat"):
        items = value if isinstance(value, list) else [value]
        return _convert(flag, [_file_text(where, item) for item in items])
    takes_text = flag.parse in (text, any_text)
    if not takes_text and isinstance(value, int | float) and not isinstance(value, bool):
        return _convert(flag, str(value))
    return _convert(flag, _file_text(where, value))


def _file_text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where} is {value!r}, expected text; put it in quotes if that is what you mean")
    return value


# Help

_LEFT = 34
#: A space that a line is never broken at.
_UNBROKEN = "\N{NO-BREAK SPACE}"


def help_text(command: str, width: int = 100) -> str:
    """What `qengine COMMAND --help` prints, in lines of at most `width` columns."""
    described = COMMANDS[command]
    width = max(60, min(width, 110))
    names = [name.upper() for name, _ in described.words]
    usage = " ".join(names) if len(names) > 1 else f"[{names[0]}]"
    lines = [f"usage: qengine {command} {usage} [flags]", "", *textwrap.wrap(described.summary, width), ""]
    for name, meaning in described.words:
        lines += _entry(name.upper(), meaning, width)
    for group in described.groups:
        lines += ["", f"{group.title}:"]
        for flag in group.flags:
            if not flag.refused:
                lines += _entry(_left_column(flag), _right_column(flag), width)
    lines += ["", "Counts take k (1000) and K (1024), m and M, g and G; sizes take MiB, GiB.", "", "Examples:"]
    for example, meaning in described.examples:
        lines += [f"  {example}", f"      {meaning}"]
    return "\n".join(lines) + "\n"


def _left_column(flag: Flag) -> str:
    name = f"--[no-]{flag.name[2:]}" if flag.kind == "on/off" else flag.name
    short = f"{flag.short}, " if flag.short else ""
    return f"{short}{name} {flag.metavar}".rstrip()


def _right_column(flag: Flag) -> str:
    if not flag.default:
        return flag.help
    return f"{flag.help} " + f"(default: {flag.default})".replace(" ", _UNBROKEN)


def _entry(left: str, right: str, width: int) -> list[str]:
    body = [line.replace(_UNBROKEN, " ") for line in textwrap.wrap(right, width - _LEFT)]
    if len(left) + 4 > _LEFT:
        return [f"  {left}", *(" " * _LEFT + line for line in body)]
    return [f"  {left}".ljust(_LEFT) + body[0], *(" " * _LEFT + line for line in body[1:])]


def overview() -> str:
    """What `qengine --help` prints."""
    lines = [
        "usage: qengine COMMAND [MODEL] [flags]",
        "",
        "Run open language models, 4-bit GPTQ, AWQ and GGUF or 16-bit, on the machine you have.",
        "",
        "Commands:",
        *(f"  {name:<13} {described.summary}" for name, described in COMMANDS.items()),
        "",
        "Flags:",
        "  -h, --help   this text; 'qengine COMMAND --help' shows a command's flags",
        "  --version    the version",
        "",
        "Without MODEL a command runs the bundled SmolLM2-135M-Instruct.",
        "",
        "Examples:",
        "  qengine chat",
        "  qengine serve ./my-model-awq --port 8000",
        '  qengine generate model.gguf --prompt "Once upon a time" --max-tokens 64',
        "",
        "Environment:",
        "  QENGINE_API_KEY      the server's key, out of the process list",
        "  QENGINE_LOG_LEVEL    debug, info, warning or error",
        "  HF_HOME, HF_HUB_OFFLINE   the hub's folder, and whether it may be asked",
    ]
    return "\n".join(lines) + "\n"
