"""`qengine chat`: a conversation in the terminal, with a model in this process or with a server.

Invariant: the conversation holds only turns that were answered, wholly or up to Ctrl-C; a refused message leaves no
trace, and no error ends the chat. Answers go to standard output, everything else to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qengine import environment
from qengine.client.api import ApiClient
from qengine.commands.running import sampling_params
from qengine.commands.settings import ChatSettings
from qengine.commands.talking import INTERRUPTED, Answer, LocalTalker, RemoteTalker, Talker
from qengine.engine import Engine
from qengine.errors import ConfigError, QEngineError
from qengine.runtime.start_times import process_age

# Gives input() editing keys and history. Some builds of Python lack it.
try:
    import readline
except ImportError:
    readline = None  # type: ignore[assignment]

_PROMPT = "> "
_HELP = "/exit or Ctrl-D ends, /new starts over, Ctrl-C stops an answer, /help lists all commands"
_COMMANDS = """\
  /new, /clear      start over; the system message stays
  /system [TEXT]    show the system message, or set it and start over
  /save FILE        write the conversation, as JSON if FILE ends in .json, else as Markdown
  /help             this list
  /exit, /quit      end; so does Ctrl-D"""
_HISTORY_LINES = 1000


class Conversation:
    """The messages so far, and how the next one is answered."""

    def __init__(self, talker: Talker, system: str | None) -> None:
        self._talker = talker
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.clear()

    def clear(self) -> None:
        """Start over, with the system message kept."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def answer(self, text: str) -> None:
        """Print the model's answer to `text` as it comes, and remember both.

        Raises:
            QEngineError: if the conversation no longer fits the context, or the answer fails.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        is_open = False

        def write(piece: str) -> None:
            nonlocal is_open
            sys.stdout.write(piece)
            sys.stdout.flush()
            is_open = True

        try:
            answer = self._talker.answer(asked, write)
        except QEngineError:
            if is_open:
                print()
            raise
        print()
        if answer.text:
            self.messages = [*asked, {"role": "assistant", "content": answer.text}]
        print(_summary(answer), file=sys.stderr)

    def save(self, file: str) -> Path:
        """Write the conversation to a new file. Raises ConfigError."""
        path = Path(file).expanduser()
        if path.suffix == ".json":
            text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=2) + "\n"
        else:
            text = "\n\n".join(f"**{m['role']}**\n\n{m['content']}" for m in self.messages) + "\n"
        try:
            with path.open("x", encoding="utf-8") as opened:
                opened.write(text)
        except OSError as error:
            raise ConfigError(f"cannot write '{path}': {error.strerror}; choose another name") from error
        return path


def _summary(answer: Answer) -> str:
    """What is said under an answer: how it ended, how long it is, how fast it came."""
    parts = []
    if answer.finish_reason == INTERRUPTED:
        parts.append("stopped")
    elif answer.finish_reason == "length":
        parts.append("cut: the limit of tokens is reached")
    if answer.num_tokens is not None:
        parts.append(f"{answer.num_tokens} tokens")
    if answer.tokens_per_s is not None:
        parts.append(f"{answer.tokens_per_s:.1f} tok/s")
    if answer.first_s is not None:
        parts.append(f"first after {answer.first_s:.2f} s")
    return f"({', '.join(parts) or 'no text'})"


def run(settings: ChatSettings) -> int:
    """Talk until the user leaves. Returns the exit code. Raises QEngineError."""
    return _run_local(settings) if settings.remote is None else _run_remote(settings)


def _run_local(settings: ChatSettings) -> int:
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
        talker = LocalTalker(engine, sampling_params(engine, settings.sampling))
        _talk(Conversation(talker, settings.system))
    finally:
        engine.shutdown()
    return 0


def _run_remote(settings: ChatSettings) -> int:
    remote = settings.remote
    assert remote is not None
    client = ApiClient(remote.address, remote.api_key)
    names = client.model_names()
    if remote.model is not None and remote.model not in names:
        raise ConfigError(f"{remote.address} has no model '{remote.model}'; it has: {', '.join(names[:20])}")
    model = remote.model or names[0]
    print(f"{model} at {remote.address}. {_HELP}.", file=sys.stderr)
    fields = {name: value for name, value in settings.sampling.items() if value is not None}
    _talk(Conversation(RemoteTalker(client, model, fields), settings.system))
    return 0


# The terminal


def _talk(conversation: Conversation) -> None:
    with _history():
        while True:
            line = _read_line()
            if line is None or line in ("/exit", "/quit"):
                return
            try:
                if not _obey(conversation, line) and line:
                    conversation.answer(line)
            except QEngineError as error:
                print(f"error: {error}\n(/new starts over)", file=sys.stderr)


def _obey(conversation: Conversation, line: str) -> bool:
    """Do what a line that is a command says. Anything else with a slash, such as a path, is a message."""
    word, _, rest = line.partition(" ")
    actions: dict[str, Callable[[Conversation, str], str]] = {
        "/new": _start_over,
        "/clear": _start_over,
        "/system": _set_system,
        "/save": _save,
        "/help": lambda _conversation, _rest: _COMMANDS,
    }
    action = actions.get(word)
    if action is not None:
        print(action(conversation, rest.strip()), file=sys.stderr)
        return True
    if line.startswith("/") and line[1:].isalpha():
        print(f"unknown command {line}: {_HELP}", file=sys.stderr)
        return True
    return False


def _start_over(conversation: Conversation, rest: str) -> str:
    conversation.clear()
    return "(a new conversation)"


def _set_system(conversation: Conversation, rest: str) -> str:
    if not rest:
        return f"(system message: {conversation.system or 'none'})"
    conversation.system = rest
    conversation.clear()
    return "(a new conversation with this system message)"


def _save(conversation: Conversation, rest: str) -> str:
    if not rest:
        raise ConfigError("/save needs the name of a file, such as /save chat.md")
    return f"(written to {conversation.save(rest)})"


@contextmanager
def _history() -> Iterator[None]:
    """Lines of earlier chats under the arrow keys. Only for a person at a terminal; a file that fails is left alone."""
    file = environment.cache_dir() / "chat-history"
    if readline is None or not sys.stdin.isatty():
        yield
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        readline.read_history_file(file)
    except OSError as error:
        print(f"(no history: {error.strerror})", file=sys.stderr)
        yield
        return
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield
    finally:
        try:
            readline.write_history_file(file)
        except OSError as error:
            print(f"(the history was not kept: {error.strerror})", file=sys.stderr)


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
