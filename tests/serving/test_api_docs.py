"""/openapi.json and /docs: complete, true to what the server really answers, and without anything from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from qengine.serving.field_notes import FIELD_NOTES
from tests.serving.chat_templates import HERMES
from tests.serving.response_events import named_events
from tests.serving.running import Running, serving
from tests.serving.scripted_engine import ScriptedEngine
from tests.serving.test_http import CHAT, TEXT, chat_body, events, text_body

RESPONSES = "/v1/responses"
_DOCS = Path(__file__).resolve().parents[2] / "docs"
API_PAGES = [_DOCS / f"{name}.md" for name in ("api", "anthropic", "embeddings")]
ANSWER = '<think>\nWell.\n</think>\n\nSo. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
ADD = {"name": "add", "parameters": {"type": "object"}}
CHAT_TOOLS = [{"type": "function", "function": ADD}]
WANTED = {"stream": True, "stream_options": {"include_progress": True, "include_usage": True}}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    engine = ScriptedEngine()
    engine.tokenizer = engine.tokenizer.with_chat_template(HERMES)
    engine.answers["hi"] = ANSWER
    with serving(engine) as running:
        yield running


@pytest.fixture(scope="module")
def document(server: Running) -> dict[str, Any]:
    found: dict[str, Any] = server.get("/openapi.json").json()
    return found


def asked_models(document: dict[str, Any]) -> dict[str, Any]:
    """The schemas of what clients send, by name."""
    found: dict[str, Any] = {}

    def visit(value: Any) -> None:
        if isinstance(value, list):
            for item in value:
                visit(item)
        elif isinstance(value, dict):
            name = str(value.get("$ref", "")).rpartition("/")[2]
            if name and name not in found:
                found[name] = document["components"]["schemas"][name]
                visit(found[name])
            for item in value.values():
                visit(item)

    for methods in document["paths"].values():
        for operation in methods.values():
            visit(operation.get("requestBody"))
    return found


def check(document: dict[str, Any], path: str, answer: Any, *, status: str = "200", media: str = "") -> None:
    (operation,) = document["paths"][path].values()
    schema = operation["responses"][status]["content"][media or "application/json"]["schema"]
    jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(answer)


def test_every_route_is_described(server: Running, document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["description"], path
            assert len(operation["tags"]) == 1, path
            assert operation["responses"]["200"]["content"], path
            assert {*operation["responses"]} == {"200", "default"}, path
            assert ("requestBody" in operation) == (method == "post"), path
    for name, schema in document["components"]["schemas"].items():
        assert schema.get("description"), name


def test_every_field_that_can_be_sent_has_a_note_and_a_line_in_the_documentation(document: dict[str, Any]) -> None:
    models = asked_models(document)
    fields = {field for schema in models.values() for field in schema["properties"]}
    assert not {
        field for schema in models.values() for field, s in schema["properties"].items() if "description" not in s
    }
    assert fields == {*FIELD_NOTES}
    text = "".join(page.read_text(encoding="utf-8") for page in API_PAGES)
    requests = [name for name in models if name.endswith("Request")]
    top = {field for name in requests for field in models[name]["properties"]}
    assert not {field for field in top if f"`{field}`" not in text}
    assert not {path for path in document["paths"] if f"`{path}`" not in text}


def test_answers_are_as_described(server: Running, document: dict[str, Any]) -> None:
    chat = chat_body(max_tokens=200, logprobs=True, top_logprobs=1, tools=CHAT_TOOLS)
    check(document, CHAT, server.post(CHAT, chat).json())
    chunks = events(server.post(CHAT, {**chat, **WANTED}))[:-1]
    text = text_body(logprobs=1)
    check(document, TEXT, server.post(TEXT, text).json())
    texts = events(server.post(TEXT, {**text, **WANTED}))[:-1]
    response = {"model": "scripted", "input": "hi", "top_logprobs": 1, "tools": [{"type": "function", **ADD}]}
    for more in ({}, {"max_output_tokens": 3}):
        check(document, RESPONSES, server.post(RESPONSES, {**response, **more}).json())
    told = named_events(server.post(RESPONSES, {**response, **WANTED}))
    for path, found in ((CHAT, chunks), (TEXT, texts), (RESPONSES, told)):
        for event in found:
            check(document, path, event, media="text/event-stream")
    for path in ("/health", "/version", "/v1/models"):
        check(document, path, server.get(path).json())
    check(document, "/v1/models/{name}", server.get("/v1/models/scripted").json())
    for path in (CHAT, TEXT, RESPONSES):
        check(document, path, server.post(path, {}).json(), status="default")
    check(document, "/v1/models", server.get("/v1/nothing").json(), status="default")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat_body(stop="x", logit_bias={"5": 1}, tools=CHAT_TOOLS, tool_choice="auto")),
        (CHAT, chat_body(messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}], stop=["x", "y"])),
        (TEXT, text_body(prompt=["a", [1, 2]], echo=True)),
        (TEXT, text_body(prompt=[1, 2])),
        (RESPONSES, {"model": "scripted", "input": [{"role": "user", "content": "hi"}], "metadata": {"a": "b"}}),
        (
            RESPONSES,
            {
                "model": "scripted",
                "input": [
                    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                    {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "c", "output": "1"},
                ],
                "text": {"format": {"type": "text"}},
            },
        ),
    ],
)
def test_bodies_that_are_taken_fit_their_description(
    server: Running, document: dict[str, Any], path: str, body: dict[str, Any]
) -> None:
    assert server.post(path, body).status_code == 200
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    validator = jsonschema.Draft202012Validator({**schema, "components": document["components"]})
    validator.validate(body)
    assert not validator.is_valid({**body, "temperature": "hot"})
    assert not validator.is_valid({name: value for name, value in body.items() if name != "model"})


def test_the_page_needs_nothing_from_elsewhere_and_no_script(server: Running, document: dict[str, Any]) -> None:
    page = server.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "<script" not in page.text
    assert re.findall(r"\son\w+=|\sstyle=|<style", page.text) == []
    assert "//" not in page.text
    for address in re.findall(r'(?:href|src)="([^"#]+)"', page.text):
        assert server.get(f"/{address.removeprefix('./')}").status_code == 200, address
    anchors = set(re.findall(r'id="([^"]+)"', page.text))
    assert set(re.findall(r'href="#([^"]+)"', page.text)) <= anchors
    for path in document["paths"]:
        assert path in page.text
    for name, schema in asked_models(document).items():
        assert name in anchors or name.endswith("Request")
        for field in schema["properties"]:
            assert f"<code>{field}</code>" in page.text


def test_with_keys_the_documents_need_one_and_say_so() -> None:
    with serving(ScriptedEngine(), api_keys=("first-key",), metrics_no_auth=True) as server:
        for path in ("/docs", "/openapi.json"):
            assert server.get(path).status_code == 401
        headers = {"x-api-key": "first-key"}
        assert "x-api-key" in server.get("/docs", headers=headers).text
        document = server.get("/openapi.json", headers=headers).json()
        assert {*document["components"]["securitySchemes"]} == {"bearer", "x-api-key"}
        operations = [(path, op) for path, methods in document["paths"].items() for op in methods.values()]
        open_paths = {path for path, operation in operations if operation.get("security") == []}
        assert open_paths == {"/health", "/metrics"}


def test_the_documents_are_there_before_the_model(server: Running) -> None:
    with serving(None) as loading:
        assert loading.get("/docs").status_code == 200
        assert loading.get("/openapi.json").json()["info"]["title"] == "qengine"
