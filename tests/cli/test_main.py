"""`main`: exit codes, one-line errors, help and version, with the commands' heavy parts replaced."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import qengine
from qengine import cli
from qengine.errors import ConfigError, EngineDeadError, LoadError, RequestError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], int]], list[tuple[str, Any]]]:
    """Replace what a command does; returns the (module, settings) pairs that were run."""

    def install(run: Callable[[Any], int]) -> list[tuple[str, Any]]:
        seen: list[tuple[str, Any]] = []

        def load(module: str) -> SimpleNamespace:
            def record(settings: Any) -> int:
                seen.append((module, settings))
                return run(settings)

            return SimpleNamespace(run=record)

        monkeypatch.setattr(cli, "import_late", load)
        return seen

    return install


def raising(error: BaseException) -> Callable[[Any], int]:
    def run(settings: Any) -> int:
        raise error

    return run


def test_a_command_runs_with_its_settings(runs: Any) -> None:
    seen = runs(lambda settings: 0)
    assert cli.main(["serve", "m", "--port", "1"]) == 0
    assert cli.main(["generate", "--prompt", "x"]) == 0
    assert cli.main(["--debug", "chat"]) == 0
    assert cli.main(["inspect", "m", "--gpu", "4090"]) == 0
    assert cli.main(["bench", "serve", "m"]) == 0
    assert cli.main(["bench", "offline", "m"]) == 0
    names = ("serve", "generate", "chat", "inspect", "bench_serve", "bench_offline")
    assert [module for module, _ in seen] == [f"qengine.commands.{name}" for name in names]
    assert seen[0][1].server.port == 1


def test_the_exit_code_is_the_commands(runs: Any) -> None:
    runs(lambda settings: 7)
    assert cli.main(["chat"]) == 7


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("max_model_len is 0, expected more"), 2, "error: --max-model-len is 0, expected more"),
        (LoadError("no model at '/m'\nnor there"), 2, "error: no model at '/m' nor there"),
        (RequestError("temperature is -1"), 2, "error: --temperature is -1"),
        (EngineDeadError("it died"), 1, "error: it died"),
        (ZeroDivisionError("by zero"), 1, "error: internal error: ZeroDivisionError: by zero (--debug shows where)"),
    ],
)
def test_errors_are_one_line(
    runs: Any, capsys: pytest.CaptureFixture[str], error: Exception, code: int, line: str
) -> None:
    runs(raising(error))
    assert cli.main(["chat"]) == code
    assert capsys.readouterr().err == line + "\n"


def test_debug_shows_the_traceback(runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    runs(raising(LoadError("no model")))
    assert cli.main(["chat", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: no model\n")


def test_ctrl_c(runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    runs(raising(KeyboardInterrupt()))
    assert cli.main(["chat"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sevre"], "unknown command 'sevre'; did you mean 'serve'?"),
        (["train"], "unknown command 'train' (commands: serve, generate, chat, inspect, plan, quantize"),
        (["bench"], "unknown command 'bench'"),
        (["bench", "sevre"], "unknown command 'bench sevre'; did you mean 'bench serve'?"),
        (["--versoin"], "unknown flag '--versoin'; did you mean '--version'?"),
        (["serve", "--prot", "1"], "unknown flag --prot; did you mean '--port'?"),
        (["serve", "--port", "70000"], "--port is '70000'"),
        (["serve", "--max-model-len", "-1"], "--max-model-len is -1"),
        (["serve", "--gpu-memory-utilization", "nan"], "--gpu-memory-utilization is nan"),
        (["serve", "--kv-cache-dtype", "fp9"], "--kv-cache-dtype is 'fp9'"),
        (["serve", "--dtype", "int3"], "--dtype is 'int3'"),
        (["generate"], "nothing to continue"),
        (["inspect", "--gpu", "rtx4090"], "--gpu 'rtx4090' is not a card with known figures; did you mean '4090'?"),
        (["inspect", "--gpu", "abacus"], "--gpu 'abacus' is not a card with known figures (known: 3090, 4090, 5090,"),
        (["inspect", "--gpu", "4090", "--device", "cpu"], "--gpu and --device cpu contradict each other"),
        (["inspect", "--rows", "0"], "--rows is 0, expected the sequences of a step"),
        (["inspect", "--rows", "many"], "--rows is 'many', expected a whole number"),
        (["inspect", "--bandwidth", "0"], "--bandwidth is 0.0, expected GB/s above zero"),
        (["inspect", "--bandwidth", "nan"], "--bandwidth is nan, expected GB/s above zero"),
        (["inspect", "--dtype", "int3"], "--dtype is 'int3'"),
        (["inspect", "--tokenizer", "t"], "--tokenizer is a flag of 'qengine serve', not of 'qengine inspect'"),
    ],
)
def test_wrong_options_exit_2_before_anything_is_loaded(
    runs: Any, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    seen = runs(lambda settings: 0)
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: " + message)
    assert err.count("\n") == 1
    assert not seen


def test_a_terminal_shows_errors_in_red(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cli.main(["sevre"])
    assert capsys.readouterr().err.startswith("\033[31merror: ")
    monkeypatch.setenv("NO_COLOR", "1")
    cli.main(["sevre"])
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"], ["--debug", "--help"], ["help", "nothing"]])
def test_the_overview(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert cli.main(words) == 0
    assert capsys.readouterr().out.startswith("usage: qengine COMMAND")


@pytest.mark.parametrize(
    "words", [["serve", "--help"], ["serve", "m", "--prot", "-h"], ["help", "serve"], ["--help", "serve"]]
)
def test_the_help_of_a_command(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert cli.main(words) == 0
    assert capsys.readouterr().out.startswith("usage: qengine serve [MODEL] [flags]")


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"qengine {qengine.__version__}\n"


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (
            "use max_model_len 512, or raise kv_cache_memory_bytes",
            "use --max-model-len 512, or raise --kv-cache-memory-bytes",
        ),
        ("seed is -1, expected an integer", "--seed is -1, expected an integer"),
        ("seed of the model is odd", "seed of the model is odd"),
        ("/models/max_model_len/config.json: broken", "/models/max_model_len/config.json: broken"),
        ("my_max_model_len is 3", "my_max_model_len is 3"),
        ("--max-model-len is 3", "--max-model-len is 3"),
    ],
)
def test_option_names_read_as_flags(message: str, shown: str) -> None:
    assert cli._with_flag_names(message) == shown


# Logging


def _levels(runs: Any, words: list[str]) -> tuple[int, int]:
    runs(lambda settings: 0)
    assert cli.main(words) == 0
    return logging.getLogger("qengine").level, logging.getLogger().level


def test_commands_that_own_the_terminal_are_quiet(runs: Any) -> None:
    assert _levels(runs, ["serve"]) == (logging.INFO, logging.WARNING)
    assert _levels(runs, ["chat"]) == (logging.WARNING, logging.WARNING)
    assert _levels(runs, ["chat", "--debug"]) == (logging.DEBUG, logging.WARNING)


def test_the_environment_sets_the_level(
    runs: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QENGINE_LOG_LEVEL", "ERROR")
    assert _levels(runs, ["serve"]) == (logging.ERROR, logging.ERROR)
    monkeypatch.setenv("QENGINE_LOG_LEVEL", "infos")
    assert cli.main(["serve"]) == 2
    assert "QENGINE_LOG_LEVEL is 'infos', expected one of: debug, info, warning, error; did you mean 'info'?" in (
        capsys.readouterr().err
    )


def test_messages_are_plain_lines_on_standard_error(runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def run(settings: Any) -> int:
        logging.getLogger("qengine.engine").info("ready")
        logging.getLogger("qengine.engine").debug("hidden")
        logging.getLogger("elsewhere").info("hidden")
        return 0

    runs(run)
    cli.main(["serve"])
    cli.main(["serve"])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split(maxsplit=1)[1] for line in captured.err.splitlines()] == ["INFO    ready"] * 2


def test_what_a_file_says_gives_no_orders_to_a_terminal(runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    title, colour = "\x1b]0;x\x07", "\x1b[2J\r"

    def run(settings: Any) -> int:
        logging.getLogger("qengine.engine").warning("it is called %s\nsecond line", title)
        raise LoadError(f"architecture {colour}is not supported" + "x" * 100_000)

    runs(run)
    assert cli.main(["serve"]) == 2
    said = capsys.readouterr().err
    assert "it is called \\x1b]0;x\\x07\nsecond line\n" in said
    assert "error: architecture \\x1b[2J" in said
    assert not set(said) & {"\x1b", "\x07", "\r"}
    assert len(said) < 5000


# As a process


def shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)


def test_a_reader_that_leaves_is_not_an_error() -> None:
    code = (
        "import sys, types; from qengine import cli\n"
        "def run(settings):\n    for i in range(200000): print('line', i)\n    return 0\n"
        "cli.import_late = lambda module: types.SimpleNamespace(run=run)\n"
        "sys.exit(cli.main(['chat']))"
    )
    done = shell(f'"{sys.executable}" -c "{code}" | head -1; echo "${{PIPESTATUS[0]}}"')
    assert done.stdout.split("\n")[:2] == ["line 0", "141"]
    assert done.stderr == ""


def test_help_to_a_reader_that_leaves() -> None:
    done = shell(f'"{sys.executable}" -m qengine serve --help | head -c 1')
    assert done.stdout == "u"
    assert done.stderr == ""


def test_an_ascii_terminal_shows_what_it_can() -> None:
    done = shell(f'PYTHONIOENCODING=ascii "{sys.executable}" -m qengine größe')
    assert done.returncode == 2
    assert "unknown command 'gr??e'" in done.stderr
