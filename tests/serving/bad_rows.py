"""The words in which the tables of bad inputs are written: a case, rows of fields, and a good body for each route."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qengine.serving.limits import LIMITS

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES, COUNT = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
EMBED, TOKENIZE, DETOKENIZE = "/v1/embeddings", "/tokenize", "/detokenize"
MODEL = "tiny"
MAX_MODEL_LEN = 512
VOCAB = 2048
KEY, OTHER_KEY = "a-secret-key", "another-secret-key"
#: The server closed the connection without an answer.
CLOSED = 0
#: A chat template's own refusal, and what makes it.
REFUSAL = "somebody must ask something"
TEMPLATE = "{% if messages[-1].role == 'system' %}{{ raise_exception('" + REFUSAL + "') }}{% endif %}"

USER = {"role": "user", "content": "hi"}
#: Path -> the least that a good request has. Every answer is short.
ROUTES: Mapping[str, dict[str, Any]] = {
    CHAT: {"model": MODEL, "messages": [USER], "max_tokens": 2},
    TEXT: {"model": MODEL, "prompt": "hi", "max_tokens": 2},
    RESPONSES: {"model": MODEL, "input": "hi", "max_output_tokens": 2},
    MESSAGES: {"model": MODEL, "messages": [USER], "max_tokens": 2},
    COUNT: {"model": MODEL, "messages": [USER]},
    EMBED: {"model": MODEL, "input": "hi"},
    TOKENIZE: {"model": MODEL, "prompt": "hi"},
    DETOKENIZE: {"model": MODEL, "tokens": [5, 6]},
}
#: Path -> what some of the fields are called there.
NAMES: Mapping[str, dict[str, str]] = {
    RESPONSES: {"max_tokens": "max_output_tokens"},
    MESSAGES: {"stop": "stop_sequences"},
}


@dataclass(frozen=True)
class Case:
    """One request and its right answers.

    Attributes:
        content: bytes of the body; None for none.
        headers: beside Host and Content-Length, in order; names may repeat.
        raw: the whole request in place of all that.
        says: words that must be in the error's message.
    """

    name: str
    statuses: tuple[int, ...]
    path: str = "/health"
    method: str = "GET"
    content: bytes | None = None
    headers: tuple[tuple[str, str], ...] = ()
    raw: bytes | None = None
    param: str | None = None
    says: str = ""

    def request(self) -> bytes:
        """What is sent."""
        if self.raw is not None:
            return self.raw
        lines = [f"{self.method} {self.path} HTTP/1.1", "Host: localhost"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        if self.content is not None:
            lines.append(f"Content-Length: {len(self.content)}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + (self.content or b"")


JSON = (("Content-Type", "application/json"),)


def post(name: str, statuses: int | tuple[int, ...], path: str, content: bytes | Any, **more: Any) -> Case:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    allowed = statuses if isinstance(statuses, tuple) else (statuses,)
    return Case(name, allowed, path, "POST", data, **{"headers": JSON, **more})


@dataclass(frozen=True)
class Fields:
    """Fields over a good body. DROP in place of a value leaves the field out."""

    name: str
    status: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    param: str | None = None
    says: str = ""

    def on(self, path: str) -> Case:
        names = NAMES.get(path, {})
        fields = {names.get(k, k): v for k, v in self.fields.items()}
        param = self.param if self.param is None else names.get(self.param, self.param)
        body = {k: v for k, v in {**ROUTES[path], **fields}.items() if v is not DROP}
        return post(f"{path}: {self.name}", self.status, path, body, param=param, says=self.says)


DROP = object()


def each(name: str, field_name: str, status: int, values: Sequence[Any], **more: Any) -> list[Fields]:
    """One row for each value of one field; a refusal must name it."""
    param = field_name if status == 400 else None
    return [Fields(f"{name}: {short(v)}", status, {field_name: v}, **{"param": param, **more}) for v in values]


def short(value: Any) -> str:
    text = "(nothing)" if value is DROP else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}... ({len(text)})"


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


BAD_SCHEMAS: Mapping[str, Any] = {
    "no object": [],
    "no such type": {"type": "strnig"},
    "a type that is no name": {"type": 5},
    "contradiction": {"type": "integer", "minimum": 5, "maximum": 1},
    "a bad pattern": {"type": "string", "pattern": "(["},
    "a remote reference": {"$ref": "http://169.254.169.254/schema.json"},
    "a file": {"$ref": "file:///etc/passwd"},
    "a reference to nothing": {"$ref": "#/$defs/missing"},
    "too deep": nested(LIMITS.schema_depth + 1),
    "too large": {"enum": ["x" * 100] * (LIMITS.schema_bytes // 100)},
}
