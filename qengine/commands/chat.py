"""`qengine chat`: a conversation in the terminal, over the model's chat template.

Invariant: the conversation holds only turns that were answered, wholly or up to Ctrl-C; a refused message leaves no
trace. Ctrl-C never interrupts a step: it is noticed between two of them, because a step cut short would end the engine.
"""

from __future__ import annotations

import itertools
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

from qengine.commands.running import print_as_it_comes, run_requests, sampling_params
from qengine.commands.settings import ChatSettings
from qengine.engine import Engine
from qengine.errors import ConfigError, RequestError
from qengine.request import SamplingParams
from qengine.runtime.start_times import process_age

# Loaded for what its import does: it gives input() editing keys and history.
try:
    import readline
except ImportError:
    readline = None  # type: ignore[assignment]

_PROMPT = "> "
_HELP = "/exit or Ctrl-D ends, /new starts over, Ctrl-C stops an answer"


class CtrlCFlag:
    """While active, Ctrl-C sets `is_set` instead of raising; a second one raises, for a step that takes too long."""

    def __init__(self) -> None:
        self.is_set = False

    def __enter__(self) -> CtrlCFlag:
        self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True


class Conversation:
    """The messages so far, and how the next one is answered."""

    def __init__(self, engine: Engine, params: SamplingParams, system: str | None) -> None:
        self._engine = engine
        self._params = params
        self._opening: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        self._ids = itertools.count()
        self.messages = list(self._opening)

    def clear(self) -> None:
        """Start over, with the system message kept."""
        self.messages = list(self._opening)

    def answer(self, text: str) -> None:
        """Print the model's answer to `text` as it comes, and remember both.

        Raises:
            RequestError: if the conversation no longer fits the context, or the template refuses it.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        rendered = self._engine.tokenizer.render_chat(asked, add_generation_prompt=True)
        request = self._engine.make_request(str(next(self._ids)), rendered, self._params, add_special_tokens=False)
        with CtrlCFlag() as interrupted:
            output = print_as_it_comes(run_requests(self._engine, [request], lambda: interrupted.is_set))
        print()
        if output is not None and output.outputs[0].text:
            self.messages = [*asked, {"role": "assistant", "content": output.outputs[0].text}]
        if interrupted.is_set:
            print("(stopped)", file=sys.stderr)
        elif output is not None and output.outputs[0].finish_reason == "length":
            print("(cut: the limit of tokens is reached)", file=sys.stderr)


def run(settings: ChatSettings) -> int:
    """Talk until the user leaves. Returns the exit code. Raises QEngineError."""
    engine = Engine.start(settings.engine, show_progress=sys.stderr.isatty(), import_seconds=process_age())
    try:
        if not engine.tokenizer.reads_text:
            raise ConfigError(
                f"'{engine.info.model}' has no tokenizer to chat with; give a folder with one: --tokenizer"
            )
        if engine.tokenizer.chat_template is None:
            raise ConfigError(
                f"'{engine.info.model}' has no chat template; give one with --chat-template, or use qengine generate"
            )
        info = engine.info
        print(f"{info.model} ({info.description}), context {info.max_model_len} tokens. {_HELP}.", file=sys.stderr)
        _talk(Conversation(engine, sampling_params(engine, settings.sampling), settings.system))
    finally:
        engine.shutdown()
    return 0


def _talk(conversation: Conversation) -> None:
    while True:
        line = _read_line()
        if line is None or line in ("/exit", "/quit"):
            return
        if line == "/new":
            conversation.clear()
            print("(a new conversation)", file=sys.stderr)
        elif line.startswith("/") and line[1:].isalpha():
            print(f"unknown command {line}: {_HELP}", file=sys.stderr)
        elif line:
            try:
                conversation.answer(line)
            except RequestError as error:
                print(f"error: {error}\n(/new starts over)", file=sys.stderr)


def _read_line() -> str | None:
    """The next line without surrounding blanks, "" after Ctrl-C, None at the end of input."""
    try:
        line = input(_PROMPT if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except KeyboardInterrupt:
        print(f"\n({_HELP})", file=sys.stderr)
        return ""
    return line.encode("utf-8", errors="replace").decode("utf-8").strip()
