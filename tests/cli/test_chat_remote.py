"""`qengine chat --url` against a server with a scripted engine, and the commands of every chat."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qengine import cli
from qengine.commands import chat
from qengine.commands.parsing import parse
from qengine.commands.settings import chat_settings
from qengine.commands.talking import INTERRUPTED, Answer
from qengine.errors import ConfigError
from tests.serving.running import Running, serving
from tests.waiting import wait_until
from tests.web.talking_engine import TalkingEngine

Typed = Callable[..., None]


@pytest.fixture
def server() -> Iterator[Running]:
    engine = TalkingEngine()
    engine.say("The sky is blue.")
    with serving(engine, served_model_names=("first", "second")) as running:
        yield running


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Typed:
    def install(*lines: Any) -> None:
        rest = iter(lines)

        def read(prompt: str = "") -> str:
            line = next(rest, None)
            if line is None:
                raise EOFError
            return str(line() if callable(line) else line)

        monkeypatch.setattr("builtins.input", read)

    return install


def test_a_served_model_answers(server: Running, typed: Typed, capsys: pytest.CaptureFixture[str]) -> None:
    typed("one", "two")
    words = ["--url", server.url, "--system", "S", "--temperature", "0.5", "--seed", "3", "--max-tokens", "99"]
    assert cli.main(["chat", *words]) == 0
    captured = capsys.readouterr()
    assert captured.out == "The sky is blue.\nThe sky is blue.\n"
    assert f"first at {server.url}" in captured.err
    assert f"({len(server.engine.script)} tokens, " in captured.err
    request = server.engine.prepared[-1]
    assert [request.prompt.count(said) for said in ("S<|im_end|>", "one", "The sky is blue.", "two")] == [1, 1, 1, 1]
    assert (request.params.temperature, request.params.seed, request.params.max_tokens) == (0.5, 3, 99)


def test_a_model_can_be_chosen(server: Running, typed: Typed, capsys: pytest.CaptureFixture[str]) -> None:
    typed("hi")
    assert cli.main(["chat", "second", "--url", server.url]) == 0
    assert f"second at {server.url}" in capsys.readouterr().err
    assert cli.main(["chat", "third", "--url", server.url]) == 2
    assert "has no model 'third'; it has: first, second" in capsys.readouterr().err


def test_an_error_of_the_server_does_not_end_the_chat(
    server: Running, typed: Typed, capsys: pytest.CaptureFixture[str]
) -> None:
    typed("word " * 70_000, "hi")
    assert cli.main(["chat", "--url", server.url]) == 0
    captured = capsys.readouterr()
    assert "error: the server says:" in captured.err
    assert captured.out == "The sky is blue.\n"
    assert "word word" not in server.engine.prepared[-1].prompt


def test_ctrl_c_stops_the_answer_of_a_server(
    server: Running, typed: Typed, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.engine.say("on and on " * 100)
    server.engine.hold()
    server.engine.allow(6)
    written = threading.Event()
    out = sys.stdout

    def write(text: str) -> int:
        written.set()
        return out.write(text)

    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=write, flush=out.flush))

    def interrupt() -> None:
        written.wait(20)
        time.sleep(0.3)  # By now the chat waits for more. (Python may miss a signal just before it begins to wait.)
        os.kill(os.getpid(), signal.SIGINT)

    def second() -> str:
        wait_until(lambda: server.engine.allow(1) is None and len(server.engine.aborted) == 1)
        server.engine.say("Enough.")
        server.engine.allow()
        return "again"

    thread = threading.Thread(target=interrupt)
    thread.start()
    typed("hi", second)
    assert cli.main(["chat", "--url", server.url]) == 0
    thread.join()
    monkeypatch.setattr(sys, "stdout", out)
    assert "(stopped" in capsys.readouterr().err
    assert "again" in server.engine.prepared[-1].prompt


def test_commands(server: Running, typed: Typed, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saved, text = tmp_path / "chat.json", tmp_path / "chat.md"
    typed("/help", "/system", "/system Be brief.", "hi", f"/save {saved}", f"/save {text}", f"/save {saved}", "/save",
          "/clear", "hello", "/quit", "never")  # fmt: skip
    assert cli.main(["chat", "--url", server.url]) == 0
    errors = capsys.readouterr().err
    for said in ("/save FILE", "(system message: none)", "(written to ", "choose another name", "/save needs the name"):
        assert said in errors
    messages = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert "**assistant**\n\nThe sky is blue.\n" in text.read_text(encoding="utf-8")
    assert "hi<|im_end|>" not in server.engine.prepared[-1].prompt
    assert "Be brief." in server.engine.prepared[-1].prompt


def test_history_is_kept_for_people_alone(
    server: Running, typed: Typed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QENGINE_CACHE_DIR", str(tmp_path / "cache"))
    file = tmp_path / "cache" / "chat-history"
    typed("/exit")
    assert cli.main(["chat", "--url", server.url]) == 0
    assert not file.exists()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    typed(lambda: chat.readline.add_history("a secret") or "/exit")  # type: ignore[func-returns-value]
    assert cli.main(["chat", "--url", server.url]) == 0
    assert "a secret" in file.read_text(encoding="utf-8")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--url", "ftp://x"], "--url is 'ftp://x', expected an address"),
        (["--url", "http://x", "--dtype", "float32"], "--dtype is for a model in this process"),
        (["--url", "http://x", "--api-key", "a\nb"], "--api-key has characters"),
        (["--api-key", "abcd"], "--api-key is for a server; give its --url too"),
    ],
)
def test_what_contradicts_itself_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chat_settings(parse("chat", words))


def test_the_key_comes_from_the_flag_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QENGINE_API_KEY", "from-environment")
    words = ["--url", "http://x"]
    settings = [chat_settings(parse("chat", [*words, *more])) for more in ((), ("--api-key", "from-flag"))]
    assert [found.remote.api_key for found in settings if found.remote] == ["from-environment", "from-flag"]


def test_the_rate_leaves_the_first_token_out() -> None:
    assert Answer("x", 11, "stop", first_s=1.0, last_s=3.0).tokens_per_s == 5.0
    for unknown in (Answer("x", 1, "stop", 1.0, 1.0), Answer("x", None, INTERRUPTED, 1.0, 3.0)):
        assert unknown.tokens_per_s is None
