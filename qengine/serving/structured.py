"""From the fields in which clients ask for a form (OpenAI's, vLLM's, vLLM's older ones) to one grammar.

Invariant: at most one field asks, and what it asks is within `limits`. Compiling is the engine's business.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from qengine.errors import RequestError
from qengine.grammars.sources import GrammarSource, source_of
from qengine.request import StructuredOutputs
from qengine.serving.errors import invalid
from qengine.serving.protocol import GenerationRequest


@dataclass(frozen=True, slots=True)
class Form:
    """A form and the field that asks for it, which errors name."""

    source: GrammarSource
    param: str

    def after(self, lead: str) -> Form:
        """The same form with something before it; `lead` is as of `GrammarSource`."""
        return Form(replace(self.source, lead=lead), self.param)

    def json_schema(self) -> dict[str, Any]:
        """The JSON schema that is asked for.

        Raises:
            ApiError: the form is no JSON, so that it cannot stand beside tool calls.
        """
        if self.source.kind != "json_schema":
            raise invalid(f"{self.param} beside tools must ask for JSON; leave one of them out", param=self.param)
        schema: dict[str, Any] = json.loads(self.source.text)
        return schema


def form_of(request: GenerationRequest) -> Form | None:
    """The form that a request asks for; None for free text.

    Raises:
        ApiError: two fields ask, or the one that does is malformed.
    """
    asked = _asked(request)
    if not asked:
        return None
    if len(asked) > 1:
        raise invalid(f"{' and '.join(asked)} both ask for a form, expected at most one of them", param=[*asked][1])
    ((param, fields),) = asked.items()
    try:
        return Form(source_of(StructuredOutputs(**fields)), param)
    except RequestError as error:
        raise invalid(f"{param}: {error}", param=param, code=error.code) from error


def _asked(request: GenerationRequest) -> dict[str, dict[str, Any]]:
    """What each field asks for, as arguments of StructuredOutputs."""
    asked: dict[str, dict[str, Any]] = {}
    if request.response_format is not None and (wanted := _response_format(request)):
        asked["response_format"] = wanted
    if request.structured_outputs is not None:
        asked["structured_outputs"] = request.structured_outputs.model_dump(by_alias=True)
    for kind in ("json", "regex", "choice", "grammar"):
        value = getattr(request, f"guided_{kind}")
        if value is not None:
            asked[f"guided_{kind}"] = {kind: value}
    return asked


def _response_format(request: GenerationRequest) -> dict[str, Any]:
    wanted = request.response_format
    assert wanted is not None
    if wanted.type == "json_object":
        return {"json_object": True}
    if wanted.type == "text":
        return {}
    if wanted.json_schema is None:
        raise invalid("response_format.json_schema is missing", param="response_format.json_schema")
    return {"json": wanted.json_schema.schema_}
