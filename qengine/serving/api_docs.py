"""/openapi.json, and /docs: the same as a page for people.

Invariant: the page needs no script and nothing from elsewhere, so it can be read offline and tells nobody that it was.
Both need a key like any other route.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from jinja2 import Environment, PackageLoader
from starlette.responses import Response

from qengine.serving.api_schema import ABOUT, api_document, described
from qengine.serving.errors import json_response
from qengine.serving.page import HEADERS

_TEMPLATE = "docs.html.jinja"
_TAGS = ("Generate", "Text", "Model", "Server")
_LARGE = 2**31 - 1

router = APIRouter()


class ApiDocs:
    """The document of an application, made when it is first asked for.

    Args:
        app: whose routes.
        needs_key: whether there are keys; `open_paths` need none.
    """

    def __init__(self, app: FastAPI, *, needs_key: bool, open_paths: Set[str]) -> None:
        self._app = app
        self._needs_key = needs_key
        self._open_paths = open_paths
        self._document: dict[str, Any] | None = None
        self._page: str | None = None

    def document(self) -> dict[str, Any]:
        """As of OpenAPI 3.1. May take some hundredths of a second, so not for the event loop."""
        if self._document is None:
            self._document = api_document(self._app, needs_key=self._needs_key, open_paths=self._open_paths)
        return self._document

    def page(self) -> str:
        """As HTML."""
        if self._page is None:
            environment = Environment(
                loader=PackageLoader("qengine.serving", "web"), autoescape=True, trim_blocks=True, lstrip_blocks=True
            )
            document = self.document()
            operations = sorted(_operations(document), key=lambda operation: operation.order)
            self._page = environment.get_template(_TEMPLATE).render(
                about=ABOUT,
                version=document["info"]["version"],
                needs_key=self._needs_key,
                operations=operations,
                models=_models(document, operations),
            )
        return self._page


@router.get("/openapi.json", **described(tag="Server", media_type="application/json"))
async def openapi(http: Request) -> Response:
    """This API for programs, as an OpenAPI document."""
    return json_response(await asyncio.to_thread(_api_of(http).document))


@router.get("/docs", **described(tag="Server", media_type="text/html"))
async def docs(http: Request) -> Response:
    """This API for people."""
    page = await asyncio.to_thread(_api_of(http).page)
    return Response(page, headers=dict(HEADERS), media_type="text/html")


def _api_of(http: Request) -> ApiDocs:
    api = http.app.state.api
    assert isinstance(api, ApiDocs)
    return api


# What the page shows


#: A piece of text, and the model that it names.
_Words = tuple[str, str | None]


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    type: tuple[_Words, ...]
    note: str
    is_required: bool

    @property
    def models(self) -> list[str]:
        return [model for _, model in self.type if model is not None]


@dataclass(frozen=True, slots=True)
class _Operation:
    method: str
    path: str
    tag: str
    summary: str
    paragraphs: tuple[str, ...]
    fields: tuple[_Field, ...]
    can_stream: bool

    @property
    def anchor(self) -> str:
        return f"{self.method}{self.path}".replace("/", "-").replace("{", "").replace("}", "").replace(":", "-")

    @property
    def order(self) -> int:
        return _TAGS.index(self.tag) if self.tag in _TAGS else len(_TAGS)


def _operations(document: Mapping[str, Any]) -> Iterator[_Operation]:
    schemas = document["components"]["schemas"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            summary, *more = operation.get("description", operation["summary"]).split("\n\n")
            answers = operation["responses"]["200"].get("content", {})
            yield _Operation(
                method.upper(),
                path,
                operation.get("tags", [""])[0],
                summary,
                tuple(more),
                tuple(_fields(schemas[_body_model(operation)])) if "requestBody" in operation else (),
                "text/event-stream" in answers,
            )


def _body_model(operation: Mapping[str, Any]) -> str:
    return str(operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]).rpartition("/")[2]


def _fields(schema: Mapping[str, Any]) -> Iterator[_Field]:
    """The required ones first."""
    required = schema.get("required", ())
    for name, field in sorted(schema.get("properties", {}).items(), key=lambda item: item[0] not in required):
        yield _Field(name, tuple(_type_words(field)), field.get("description", ""), name in required)


def _models(document: Mapping[str, Any], operations: list[_Operation]) -> list[tuple[str, str, tuple[_Field, ...]]]:
    """What requests hold: name, what it is, its fields; in the order in which a reader meets them."""
    schemas = document["components"]["schemas"]
    found: dict[str, tuple[_Field, ...]] = {}
    waiting = [name for operation in operations for field in operation.fields for name in field.models]
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            found[name] = tuple(_fields(schemas[name]))
            waiting += [inner for field in found[name] for inner in field.models]
    return [(name, schemas[name].get("description", ""), fields) for name, fields in found.items()]


def _type_words(schema: Mapping[str, Any]) -> Iterator[_Words]:
    """What a value may be, in words."""
    if "$ref" in schema:
        name = str(schema["$ref"]).rpartition("/")[2]
        yield name, name
        return
    options = [option for option in schema.get("anyOf", schema.get("oneOf", ())) if option.get("type") != "null"]
    for index, option in enumerate(options):
        yield (" or " if index else ""), None
        yield from _type_words(option)
    if options:
        return
    if "enum" in schema or "const" in schema:
        yield " or ".join(str(value) for value in schema.get("enum", [schema.get("const")])), None
    elif schema.get("type") == "array":
        yield "list of ", None
        yield from _type_words(schema.get("items", {}))
    else:
        names = {"string": "text", "boolean": "true or false", None: "anything"}
        kind = schema.get("type")
        yield f"{names.get(kind, kind)}{_bounds(schema)}", None


def _bounds(schema: Mapping[str, Any]) -> str:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum")
    if low is None:
        return ""
    start = f"{'above' if 'exclusiveMinimum' in schema else 'from'} {low:.10g}"
    # Larger ones are there to keep numbers within 64 bits, and tell a reader nothing.
    return f", {start} to {high:.10g}" if high is not None and high < _LARGE else f", {start}"
