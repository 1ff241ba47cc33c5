"""Who answers in `qengine chat`: a model in this process, or a server at a URL.

Invariant: `answer` writes text as it comes and returns all of it; after Ctrl-C what had come is kept. A step of a local
model is never cut short, because that would end its engine; a server's answer is stopped by closing the connection.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Protocol

from qengine.client.api import ApiClient
from qengine.client.events import finish_reason_of, num_tokens_of, text_of
from qengine.commands.running import run_requests
from qengine.engine import Engine
from qengine.request import SamplingParams
from qengine.tokenizer.tokenizer import most_chars

INTERRUPTED = "interrupted"
Messages = Sequence[Mapping[str, Any]]
Write = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """What was said, and how fast.

    Attributes:
        text: all of it.
        num_tokens: as counted by who answered; None if it did not say.
        finish_reason: "stop", "length", INTERRUPTED or what the server says.
        first_s: seconds until the first text, None if there was none.
        last_s: seconds until the last text.
    """

    text: str
    num_tokens: int | None
    finish_reason: str | None
    first_s: float | None
    last_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """The rate after the first token, where it can be known."""
        if self.num_tokens is None or self.num_tokens < 2 or self.first_s is None or self.last_s <= self.first_s:
            return None
        return (self.num_tokens - 1) / (self.last_s - self.first_s)


class Talker(Protocol):
    """Answers a conversation."""

    def answer(self, messages: Messages, write: Write) -> Answer:
        """Answer `messages`, handing new text to `write`. Raises QEngineError."""


class _Recorder:
    """Collects an answer, and when its pieces came."""

    def __init__(self, write: Write, clock: Callable[[], float] = time.perf_counter) -> None:
        self._write = write
        self._clock = clock
        self._begin = clock()
        self._pieces: list[str] = []
        self._first_s: float | None = None
        self._last_s = 0.0

    def add(self, text: str) -> None:
        if text:
            self._last_s = self._clock() - self._begin
            self._first_s = self._last_s if self._first_s is None else self._first_s
            self._pieces.append(text)
            self._write(text)

    def answer(self, num_tokens: int | None, finish_reason: str | None) -> Answer:
        return Answer("".join(self._pieces), num_tokens, finish_reason, self._first_s, self._last_s)


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


class LocalTalker:
    """A model in this process, through its chat template."""

    def __init__(self, engine: Engine, params: SamplingParams) -> None:
        self._engine = engine
        self._params = params
        self._ids = itertools.count()

    def answer(self, messages: Messages, write: Write) -> Answer:
        """See Talker. Raises RequestError if the conversation does not fit, or the template refuses it."""
        rendered = self._engine.tokenizer.render_chat(
            [dict(m) for m in messages],
            add_generation_prompt=True,
            max_chars=most_chars(self._engine.info.max_model_len),
        )
        request = self._engine.make_request(str(next(self._ids)), rendered, self._params, add_special_tokens=False)
        recorder = _Recorder(write)
        num_shown, num_tokens, finish_reason = 0, 0, None
        with CtrlCFlag() as interrupted:
            for output in run_requests(self._engine, [request], lambda: interrupted.is_set):
                choice = output.outputs[0]
                recorder.add(choice.text[num_shown:])
                num_shown, num_tokens = max(num_shown, len(choice.text)), len(choice.token_ids)
                finish_reason = choice.finish_reason
        return recorder.answer(num_tokens, INTERRUPTED if interrupted.is_set else finish_reason)


class RemoteTalker:
    """A server's chat completions. `fields` are OpenAI's request fields beside the messages."""

    def __init__(self, client: ApiClient, model: str, fields: Mapping[str, Any]) -> None:
        self._client = client
        self._body = {"model": model, **fields}

    def answer(self, messages: Messages, write: Write) -> Answer:
        """See Talker. Raises ServerError or StreamError."""
        recorder = _Recorder(write)
        num_tokens, finish_reason = None, None
        try:
            with closing(self._client.stream_chat({**self._body, "messages": list(messages)})) as chunks:
                for chunk in chunks:
                    recorder.add(text_of(chunk))
                    num_tokens = num_tokens_of(chunk) or num_tokens
                    finish_reason = finish_reason_of(chunk) or finish_reason
        except KeyboardInterrupt:
            finish_reason = INTERRUPTED
        return recorder.answer(num_tokens, finish_reason)
