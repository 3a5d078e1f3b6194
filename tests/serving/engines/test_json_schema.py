from __future__ import annotations

from typing import Any

import pytest

from modelyard.errors import InputError
from modelyard.serving.engines.json_schema import plain_schema


def test_references_are_replaced_and_notes_are_left_out() -> None:
    schema = {
        "title": "Order",
        "$defs": {"Item": {"type": "object", "properties": {"n": {"type": "integer", "default": 1}}}},
        "type": "object",
        "properties": {"items": {"type": "array", "items": {"$ref": "#/$defs/Item"}}},
    }
    item = {"type": "object", "properties": {"n": {"type": "integer"}}}
    assert plain_schema(schema) == {"type": "object", "properties": {"items": {"type": "array", "items": item}}}


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "nonsense"}, "type is 'nonsense'"),
        ({"type": []}, "type is"),
        ({"type": "string", "pattern": "a+"}, "uses 'pattern'"),
        ({"properties": {"a": {"type": "x"}}}, "schema.a.type"),
        ({"properties": []}, "properties is no object"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength above maxLength"),
        ({"type": "array", "items": {"type": "null"}, "maxItems": 10**9}, "maxItems"),
        ({"type": "string", "maxLength": True}, "maxLength is True"),
        ({"enum": []}, "enum"),
        ({"enum": [{"a": 1}]}, "lists"),
        ({"required": ["a"]}, "required"),
        ({"additionalProperties": {"type": "string"}}, "additionalProperties"),
        ({"anyOf": []}, "anyOf"),
        ({"anyOf": [{"type": "null"}], "type": "null"}, "anyOf"),
        ({"$ref": "https://example.com/s"}, "refers to"),
        ({"$defs": {"A": {"properties": {"a": {"$ref": "#/$defs/A"}}}}, "$ref": "#/$defs/A"}, "refers to"),
        ("text", "not an object"),
    ],
)
def test_what_is_beyond_the_plain_part_is_refused_by_name(schema: Any, named: str) -> None:
    with pytest.raises(InputError, match="json_schema") as caught:
        plain_schema(schema)
    assert named in str(caught.value)


def test_a_schema_that_is_too_deep_or_too_wide_is_refused() -> None:
    deep: dict[str, Any] = {"type": "null"}
    for _ in range(50):
        deep = {"type": "array", "items": deep}
    wide = {"properties": {str(n): {"type": "null"} for n in range(3000)}}
    for schema in (deep, wide):
        with pytest.raises(InputError, match="simplify it"):
            plain_schema(schema)
