"""The OpenAPI document: every route with the models of its body and its answers, and a note on every field.

Invariant: what a route takes is described by the model that checks it, so the document cannot drift from the server.
Routes say what they take with `described`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.responses import Response

from qengine import __version__
from qengine.serving.api_answers import ErrorBody
from qengine.serving.field_notes import FIELD_NOTES

_REF = "#/components/schemas/"
_KEYS: dict[str, Any] = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
ABOUT = (
    "OpenAI's and Anthropic's API for one language model. Fields that would change an answer and are not supported are "
    "refused with status 400; unknown fields are ignored. Errors have one shape per API. With `stream`, answers are "
    "server-sent events."
)


def described(
    *,
    tag: str,
    body: type[BaseModel] | None = None,
    answer: type[BaseModel] | None = None,
    event: type[BaseModel] | None = None,
    error: type[BaseModel] = ErrorBody,
    media_type: str = "application/json",
) -> dict[str, Any]:
    """Arguments for a route's decorator.

    Args:
        tag: what it is filed under.
        body: what it takes.
        answer: what it answers; None for text of `media_type`.
        event: the data of each server-sent event, if it can stream.
        error: every answer that is one.
    """
    content: dict[str, Any] = {media_type: {"schema": {"type": "string"} if answer is None else _schema(answer)}}
    if event is not None:
        content["text/event-stream"] = {"schema": _schema(event)}
    failure = {"description": "An error", "content": {"application/json": {"schema": _schema(error)}}}
    found: dict[str, Any] = {
        "tags": [tag],
        "response_class": Response,  # It has no schema of its own that would be mixed with these.
        "responses": {200: {"description": "The answer", "content": content}, "default": failure},
    }
    if body is not None:
        request = {"required": True, "content": {"application/json": {"schema": _schema(body)}}}
        found["openapi_extra"] = {"requestBody": request}
    return found


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema(ref_template=_REF + "{model}")


def api_document(app: FastAPI, *, needs_key: bool, open_paths: Set[str]) -> dict[str, Any]:
    """The document. Takes some hundredths of a second.

    Args:
        needs_key: whether there are keys; `open_paths` need none.
    """
    document = get_openapi(title="qengine", version=__version__, description=ABOUT, routes=app.routes)
    asked: dict[str, Any] = {}
    answered: dict[str, Any] = {}
    for path, operation in _operations(document):
        # The framework's own validation of paths, which here cannot fail.
        operation["responses"].pop("422", None)
        _hoist([operation["requestBody"]] if "requestBody" in operation else [], asked)
        _hoist(operation["responses"].values(), answered)
        if needs_key and path in open_paths:
            operation["security"] = []
    for schema in asked.values():
        _add_notes(schema)
    document["components"] = {"schemas": dict(sorted({**answered, **asked}.items()))}
    if needs_key:
        document["components"]["securitySchemes"] = _KEYS
        document["security"] = [{name: []} for name in _KEYS]
    return document


def _operations(document: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for operation in methods.values():
            yield path, operation


def _hoist(holders: Iterable[dict[str, Any]], schemas: dict[str, Any]) -> None:
    """Replace schemas of models by references, and put them among `schemas` with all that they need."""
    for holder in holders:
        for media in holder.get("content", {}).values():
            schema = media["schema"]
            if "title" in schema:
                own = {name: value for name, value in schema.items() if name != "$defs"}
                for name, found in {**schema.get("$defs", {}), schema["title"]: own}.items():
                    assert schemas.setdefault(name, found) == found, f"two models are called {name}"
                media["schema"] = {"$ref": _REF + schema["title"]}


def _add_notes(schema: dict[str, Any]) -> None:
    for name, field in schema.get("properties", {}).items():
        if name in FIELD_NOTES:
            field.setdefault("description", FIELD_NOTES[name])
