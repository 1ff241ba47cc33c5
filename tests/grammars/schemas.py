"""Twenty different JSON schemas, each with an end in sight: what a server's clients ask for. And some without one."""

from __future__ import annotations

from typing import Any

SHORT = {"type": "string", "maxLength": 12}


def _object(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    needed = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


SCHEMAS: dict[str, dict[str, Any]] = {
    "boolean": {"type": "boolean"},
    "enum": {"enum": ["red", "green", "blue", 7, None]},
    "const": _object(kind={"const": "circle"}, radius={"type": "integer", "minimum": 1, "maximum": 9}),
    "bounded integer": {"type": "integer", "minimum": -40, "maximum": 120},
    "bounded number": {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
    "short string": SHORT,
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    # Not the format "date": that has a year 0, which Python, as a judge, has not.
    "date": _object(day={"type": "string", "pattern": "^20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])$"}),
    "uuid": _object(id={"type": "string", "format": "uuid"}),
    "person": _object(name=SHORT, age={"type": "integer", "minimum": 0, "maximum": 130}, alive={"type": "boolean"}),
    "optional": _object(["name"], name=SHORT, nickname=SHORT),
    "nullable": _object(value={"type": ["integer", "null"], "minimum": 0, "maximum": 999}),
    "array": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 4},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "boolean"}, {"enum": ["a", "b"]}],
        "items": False,
        "minItems": 2,
    },
    "array of objects": {"type": "array", "items": _object(x={"enum": [1, 2]}), "minItems": 1, "maxItems": 3},
    "nested": _object(a=_object(b=_object(c=_object(d={"enum": ["deep"]})))),
    "any of": {"anyOf": [_object(cat={"type": "boolean"}), _object(dog={"enum": ["big", "small"]})]},
    "reference": {
        "$defs": {"point": _object(x={"type": "integer", "minimum": 0, "maximum": 9}, y={"enum": [0, 1]})},
        **_object(start={"$ref": "#/$defs/point"}, end={"$ref": "#/$defs/point"}),
    },
    "address": _object(ip={"type": "string", "format": "ipv4"}, kind={"enum": ["host", "router"]}),
    "escapes": _object(**{'quo"te': {"enum": ['say "hi"', "back\\slash", "line\nbreak", "Grüße 🙂"]}}),
}

#: A model may go on for ever with these; a walk that ends as soon as it can does not.
ENDLESS: dict[str, dict[str, Any]] = {
    "any": {},
    "number": {"type": "number", "exclusiveMinimum": 0},
    "string": {"type": "string", "minLength": 3},
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2},
    "recursive": {
        "$defs": {"tree": _object(["leaf"], leaf={"type": "boolean"}, child={"$ref": "#/$defs/tree"})},
        "$ref": "#/$defs/tree",
    },
}
