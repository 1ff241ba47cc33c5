"""The commands: `serve` with its server replaced, `generate` and `chat` with a scripted engine and a real one."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qengine import cli
from qengine.commands import chat, generate, running, serve
from qengine.commands.flags import ADDRESS_FLAGS, MONITORING_FLAGS, SERVER_FLAGS
from qengine.commands.parsing import parse
from qengine.commands.settings import ChatSettings, GenerateSettings, serve_settings
from qengine.config import EngineConfig
from qengine.errors import ConfigError, QEngineError, RequestError
from qengine.request import CompletionOutput, RequestOutput, SamplingParams
from qengine.serving.options import ServerOptions

FIXTURE = Path(__file__).parents[1] / "fixtures" / "llama-gptq-sym-g128"


class ScriptedEngine:
    """Answers every prompt with words of a script, one word of every request per step."""

    def __init__(self, script: Callable[[str], Sequence[str]], template: str | None = "template") -> None:
        self.script = script
        self.info = SimpleNamespace(
            model="scripted", description="no weights", max_model_len=64, default_sampling={"temperature": 0.5}
        )
        self.tokenizer = SimpleNamespace(reads_text=True, chat_template=template, render_chat=self._render)
        self.requests: dict[str, tuple[str, list[str], int]] = {}
        self.prompts: list[str] = []
        self.params: list[SamplingParams] = []
        self.before_step: Callable[[], None] = lambda: None
        self.error: str | None = None
        self.is_shut_down = False

    def _render(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool, max_chars: int = 0) -> str:
        assert add_generation_prompt
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)

    def make_request(
        self, request_id: str, prompt: str, params: SamplingParams, *, add_special_tokens: bool = True
    ) -> SimpleNamespace:
        assert add_special_tokens is not prompt.startswith("<")
        if len(prompt) > 200:
            raise RequestError("the prompt is too long")
        self.prompts.append(prompt)
        self.params.append(params)
        return SimpleNamespace(request_id=request_id, prompt=prompt)

    def add(self, request: SimpleNamespace) -> None:
        self.requests[request.request_id] = (request.prompt, list(self.script(request.prompt)), 0)

    def abort(self, request_id: str) -> None:
        self.requests.pop(request_id, None)

    @property
    def has_unfinished(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[RequestOutput]:
        self.before_step()
        outputs = []
        for request_id, (prompt, words, num_said) in list(self.requests.items()):
            num_said += 1
            finished = num_said == len(words)
            choice = CompletionOutput(
                0, "".join(words[:num_said]), list(range(num_said)), finish_reason="stop" if finished else None
            )
            outputs.append(RequestOutput(request_id, prompt, [1, 2], [choice], finished=finished, error=self.error))
            self.requests[request_id] = (prompt, words, num_said)
            if finished:
                del self.requests[request_id]
        return outputs

    def shutdown(self) -> None:
        self.is_shut_down = True


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[[ScriptedEngine], ScriptedEngine]:
    def install(engine: ScriptedEngine) -> ScriptedEngine:
        started = SimpleNamespace(start=lambda config, **options: engine)
        monkeypatch.setattr(generate, "Engine", started)
        monkeypatch.setattr(chat, "Engine", started)
        return engine

    return install


# serve


def test_serve_hands_over_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[EngineConfig, ServerOptions]] = []

    def run_server(config: EngineConfig, options: ServerOptions) -> int:
        seen.append((config, options))
        return 3

    monkeypatch.setattr(serve, "run_server", run_server)
    words = "m --host 0.0.0.0 --port 0 --api-key k-1234 --served-model-name a b --max-logprobs 5 --max-queue 6"
    assert cli.main(["serve", *words.split(), "--drain-timeout", "1.5", "--allow-no-auth"]) == 3
    assert seen[0][0].load.model == "m"
    assert seen[0][1] == ServerOptions(
        host="0.0.0.0",
        port=0,
        api_keys=("k-1234",),
        served_model_names=("a", "b"),
        max_logprobs=5,
        max_queue=6,
        drain_timeout=1.5,
        allow_no_auth=True,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines reach this server"),
        (["--max-queue", "-1"], "--max-queue is -1"),
        (["--drain-timeout", "-1"], "--drain-timeout is -1.0"),
        (["--drain-timeout", "nan"], "--drain-timeout is nan"),
    ],
)
def test_what_the_server_refuses_exits_2(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert cli.main(["serve", *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_the_server_defaults_shown_are_the_ones_used() -> None:
    renamed = {"api_key": "api_keys", "served_model_name": "served_model_names"}
    defaults = ServerOptions()
    groups = (ADDRESS_FLAGS, SERVER_FLAGS, MONITORING_FLAGS)
    shown = {renamed.get(f.dest, f.dest): f for g in groups for f in g.flags if not f.refused}
    assert set(shown) - {"api_key_file"} == {field.name for field in dataclasses.fields(ServerOptions)}
    for name, flag in shown.items():
        if flag.default and flag.kind != "list":
            assert flag.parse(flag.default, flag.name) == getattr(defaults, name)
        else:
            assert not getattr(defaults, name, None)


def test_options_left_out_are_the_servers_own() -> None:
    assert serve_settings(parse("serve", [])).server == ServerOptions()


# generate


def test_one_prompt_is_written_as_it_comes(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[str] = []

    class Recorder(io.StringIO):
        def write(self, text: str) -> int:
            pieces.append(text)
            return super().write(text)

    engine = start(ScriptedEngine(lambda prompt: ["Par", "", "is", "."]))
    monkeypatch.setattr(sys, "stdout", Recorder())
    settings = GenerateSettings(EngineConfig(), ("France?",), {"max_tokens": 9}, False, False)
    assert generate.run(settings) == 0
    assert pieces == ["Par", "is", ".", "\n"]
    assert engine.is_shut_down
    assert engine.params == [SamplingParams(max_tokens=9, temperature=0.5)]


def test_flags_win_over_the_models_sampling(start: Any) -> None:
    engine = start(ScriptedEngine(lambda prompt: ["x"]))
    generate.run(GenerateSettings(EngineConfig(), ("p",), {"temperature": 0.0, "top_k": 3}, False, False))
    assert engine.params == [SamplingParams(temperature=0.0, top_k=3)]


def test_several_prompts_are_printed_in_their_order(start: Any, capsys: pytest.CaptureFixture[str]) -> None:
    start(ScriptedEngine(lambda prompt: ["answer to ", prompt] if prompt == "one" else ["two!"]))
    generate.run(GenerateSettings(EngineConfig(), ("one", "two\nlines"), {}, False, False))
    assert capsys.readouterr().out == "=== one\nanswer to one\n\n=== two lines\ntwo!\n\n"


def test_json_has_one_object_per_line(start: Any, capsys: pytest.CaptureFixture[str]) -> None:
    start(ScriptedEngine(lambda prompt: ["größe", " 1\n"]))
    generate.run(GenerateSettings(EngineConfig(), ("a", "b"), {}, False, True))
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["a", "b"]
    assert json.loads(lines[0]) == {
        "prompt": "a",
        "text": "größe 1\n",
        "finish_reason": "stop",
        "num_prompt_tokens": 2,
        "num_tokens": 2,
    }


def test_chat_prompts_go_through_the_template(start: Any) -> None:
    engine = start(ScriptedEngine(lambda prompt: ["x"]))
    generate.run(GenerateSettings(EngineConfig(), ("Hi",), {}, True, False))
    assert engine.prompts == ["<user>Hi"]


def test_a_failed_answer_is_an_error(start: Any) -> None:
    engine = start(ScriptedEngine(lambda prompt: ["x", "y"]))
    engine.error = "the logits are not finite"
    with pytest.raises(QEngineError, match="the answer failed: the logits are not finite"):
        generate.run(GenerateSettings(EngineConfig(), ("p",), {}, False, False))
    assert not engine.requests
    assert engine.is_shut_down


def test_leaving_the_loop_early_leaves_nothing_in_the_engine() -> None:
    engine = ScriptedEngine(lambda prompt: ["a", "b", "c"])
    requests = [engine.make_request(str(i), "p", SamplingParams()) for i in range(3)]
    outputs = running.run_requests(engine, requests)  # type: ignore[arg-type]
    next(outputs)
    assert len(engine.requests) == 3
    outputs.close()  # type: ignore[attr-defined]
    assert not engine.requests


# chat


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let input() return these lines; an exception is raised, the end is the end of input."""

    def install(*lines: str | BaseException) -> None:
        rest = iter(lines)

        def read(prompt: str = "") -> str:
            line = next(rest, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)

    return install


def talk(**options: Any) -> int:
    return chat.run(ChatSettings(EngineConfig(), {"max_tokens": None}, **options))


def test_a_conversation_remembers(start: Any, typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    engine = start(ScriptedEngine(lambda prompt: ["yes", "!"]))
    typed("  first ", "", "second", "/exit", "never")
    assert talk(system="Be brief.") == 0
    assert engine.prompts == ["<system>Be brief.<user>first", "<system>Be brief.<user>first<assistant>yes!<user>second"]
    assert capsys.readouterr().out == "yes!\nyes!\n"
    assert engine.is_shut_down


def test_new_starts_over_and_keeps_the_system_message(start: Any, typed: Any) -> None:
    engine = start(ScriptedEngine(lambda prompt: ["yes"]))
    typed("first", "/new", "second")
    talk(system="S")
    assert engine.prompts == ["<system>S<user>first", "<system>S<user>second"]


def test_unknown_commands_are_not_sent(start: Any, typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    engine = start(ScriptedEngine(lambda prompt: ["yes"]))
    typed("/quti", "/etc/passwd is a file", "/quit", "never")
    talk()
    assert engine.prompts == ["<user>/etc/passwd is a file"]
    assert "unknown command /quti" in capsys.readouterr().err


def test_a_refused_message_leaves_no_trace(start: Any, typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    engine = start(ScriptedEngine(lambda prompt: ["yes"]))
    typed("x" * 300, "short")
    talk()
    assert engine.prompts == ["<user>short"]
    assert "error: the prompt is too long" in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    start: Any, typed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = start(ScriptedEngine(lambda prompt: ["one ", "two ", "three"] if "more" not in prompt else ["ok"]))
    steps: list[None] = []

    def before_step() -> None:
        steps.append(None)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    engine.before_step = before_step
    typed("count", "more")
    assert talk() == 0
    assert engine.prompts == ["<user>count", "<user>count<assistant>one two <user>more"]
    captured = capsys.readouterr()
    assert captured.out == "one two \nok\n"
    assert "(stopped, 2 tokens" in captured.err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_ends_a_step_that_hangs(start: Any, typed: Any) -> None:
    engine = start(ScriptedEngine(lambda prompt: ["one"]))

    def hang() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    engine.before_step = hang
    typed("count")
    with pytest.raises(KeyboardInterrupt):
        talk()
    assert engine.is_shut_down


def test_ctrl_c_at_the_prompt_says_how_to_leave(start: Any, typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    start(ScriptedEngine(lambda prompt: ["yes"]))
    typed(KeyboardInterrupt(), "/exit")
    assert talk() == 0
    assert "(/exit or Ctrl-D ends" in capsys.readouterr().err


def test_a_model_without_a_template_cannot_chat(start: Any) -> None:
    engine = start(ScriptedEngine(lambda prompt: ["yes"], template=None))
    with pytest.raises(ConfigError, match="'scripted' has no chat template; give one with --chat-template"):
        talk()
    assert engine.is_shut_down


# A real model


def test_a_real_checkpoint_answers(capsys: pytest.CaptureFixture[str]) -> None:
    expected = json.loads((FIXTURE / "expected.json").read_text())
    words = ["generate", str(FIXTURE), "--dtype", "float32", "--temperature", "0", "--max-tokens", "24"]
    assert cli.main([*words, "--prompt", expected[0]["prompt"]]) == 0
    assert capsys.readouterr().out == expected[0]["text"] + "\n"
    prompts = [word for record in expected for word in ("--prompt", record["prompt"])]
    assert cli.main([*words, *prompts, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == [record["text"] for record in expected]


def test_a_model_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["generate", str(tmp_path / "absent"), "--prompt", "x"]) == 2
    assert capsys.readouterr().err.startswith(f"error: no model at '{tmp_path / 'absent'}'")
