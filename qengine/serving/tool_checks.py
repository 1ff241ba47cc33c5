"""Checks of the tools that a client sends, before anything is made of them.

Invariant: tools that pass have distinct names and schemas that are objects within the limits, whose types exist
and whose patterns are short text; a choice that passes is of one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qengine.errors import RequestError
from qengine.grammars.sources import schema_text
from qengine.serving.errors import invalid, shorten
from qengine.serving.limits import LIMITS
from qengine.serving.protocol import ChatCompletionRequest, NamedToolChoice
from qengine.serving.structured import Form
from qengine.serving.tool_grammar import CallableTool

_TYPES = frozenset(("object", "array", "string", "number", "integer", "boolean", "null"))


def checked_tools(request: ChatCompletionRequest, form: Form | None) -> list[CallableTool]:
    """The tools of a request.

    Args:
        form: what its answer's text is asked to look like, in whichever field.

    Raises:
        ApiError: naming the tool, or the choice, that is wrong.
    """
    tools: dict[str, CallableTool] = {}
    for index, tool in enumerate(request.tools or ()):
        function = tool.function
        if function.name in tools:
            raise invalid(f"two tools have the name {shorten(function.name)}", param=f"tools[{index}].function.name")
        where = f"tools[{index}].function.parameters"
        schema = _checked_schema(function.parameters, where)
        tools[function.name] = CallableTool(function.name, schema, bool(function.strict))
    _check_choice(request, tools, form)
    return list(tools.values())


def _check_choice(request: ChatCompletionRequest, tools: Mapping[str, CallableTool], form: Form | None) -> None:
    choice = request.tool_choice
    if choice in (None, "none", "auto"):
        return
    if not tools:
        raise invalid("tool_choice asks for a call, but there are no tools", param="tool_choice")
    if isinstance(choice, NamedToolChoice) and choice.function.name not in tools:
        raise invalid(
            f"tool_choice names {shorten(choice.function.name)}, but the tools are: {', '.join(tools)}",
            param="tool_choice",
        )
    if form is not None:
        raise invalid(
            f"tool_choice asks for a call and {form.param} for another form; leave one of them out", param=form.param
        )


def _checked_schema(schema: dict[str, Any] | None, where: str) -> dict[str, Any]:
    if not schema:
        return {"type": "object"}
    if schema.get("type", "object") != "object":
        raise invalid(f"{where}.type is {shorten(schema['type'])}, expected 'object'", param=where)
    try:
        schema_text(schema, where)
    except RequestError as error:
        raise invalid(str(error), param=where, code=error.code) from error
    for name, value in _keywords(schema):
        _check_keyword(name, value, where)
    return schema


def _keywords(schema: Any) -> Iterator[tuple[str, Any]]:
    """The "type" and "pattern" of every schema inside; names of properties are no keywords."""
    if isinstance(schema, list):
        for item in schema:
            yield from _keywords(item)
    elif isinstance(schema, dict):
        for name, value in schema.items():
            if name in ("type", "pattern"):
                yield name, value
            elif name in ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas"):
                yield from _keywords(list(value.values()) if isinstance(value, dict) else [])
            elif name not in ("enum", "const", "default", "examples"):
                yield from _keywords(value)


def _check_keyword(name: str, value: Any, where: str) -> None:
    if name == "type":
        types = value if isinstance(value, list) else [value]
        if not types or not all(isinstance(kind, str) and kind in _TYPES for kind in types):
            raise invalid(
                f"{where} has the type {shorten(value)}, expected one of {', '.join(sorted(_TYPES))}", param=where
            )
        return
    # Not compiled here: that may take seconds. Where calls are held to the schema, the grammar's trial judges it.
    if not isinstance(value, str):
        raise invalid(f"{where} has the pattern {shorten(value)}, expected a regular expression as text", param=where)
    if len(value.encode()) > LIMITS.regex_bytes:
        raise invalid(
            f"{where} has a pattern of {len(value.encode())} bytes, expected at most {LIMITS.regex_bytes}", param=where
        )
