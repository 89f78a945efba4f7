"""Schemas of answers: what is enforced, and what is refused with its place."""

from __future__ import annotations

from typing import Any

import pytest

from tokenspeed_plan.runtime.serving.openai.json_schemas import SchemaError, enforced_schema

STRING = {"type": "string"}
REFUSED: dict[str, tuple[Any, str]] = {
    "no schema": (3, "`s`: a schema is an object"),
    "not": ({"not": STRING}, r"`s\.not` cannot"),
    "deep inside": (
        {"properties": {"a": {"items": {"if": {}}}}},
        r"`s\.properties\.a\.items\.if` cannot",
    ),
    "unique items": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "beside a reference": ({"$ref": "#/$defs/a", "maxLength": 2}, r"`s\.maxLength` beside"),
    "beside a choice": ({"anyOf": [STRING], "minLength": 1}, r"`s\.minLength` beside"),
    "another document": ({"$ref": "http://x/y"}, "references into the schema itself"),
    "several at once": ({"allOf": [STRING, STRING]}, "several schemas"),
    "a pattern and a length": ({"pattern": "a", "minLength": 3}, "`minLength` beside `pattern`"),
    "a group that looks ahead": ({"pattern": "(?=a)b"}, "look around"),
    "a pattern of quotes": ({"pattern": '"'}, "quotes and backslashes"),
    "a pattern of backslashes": ({"pattern": "\\\\"}, "quotes and backslashes"),
    "many repetitions": ({"pattern": "a{9999}"}, "at most 1000 times"),
    "many repetitions at most": ({"pattern": "a{1,9999}"}, "at most 1000 times"),
    "what is required is not listed": ({"properties": {}, "required": ["b"]}, "`b` is not in"),
    "no type": ({"type": "tuple"}, "a type of JSON"),
    "an empty choice": ({"anyOf": []}, "a list of schemas"),
    "an endless count": ({"maxItems": 10**9}, "from 0 to 100000"),
    "a large step": ({"type": "integer", "multipleOf": 10**6}, "from 1 to 1000"),
    "a step of numbers": ({"type": "number", "multipleOf": 0.1}, "only enforced of integers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    schema, words = REFUSED[name]
    with pytest.raises(SchemaError, match=words):
        enforced_schema(schema, "s")


def test_too_many_schemas() -> None:
    many = {"anyOf": [STRING] * 5001}
    with pytest.raises(SchemaError, match="over 5000 schemas"):
        enforced_schema(many, "s")


@pytest.mark.parametrize(
    ("schema", "wanted"),
    [
        ({"type": "array"}, {"type": "array", "items": True}),
        ({"type": ["array", "null"]}, {"type": ["array", "null"], "items": True}),
        (
            {"type": "array", "prefixItems": [{}]},
            {"type": "array", "prefixItems": [{}], "items": False},
        ),
        ({"properties": {"not": STRING, "if": STRING}}, None),
        ({"$ref": "#/$defs/a", "description": "d", "$defs": {"a": STRING}}, None),
        ({"pattern": "(?:a|b){1,1000},2000"}, None),
        ({"type": "array", "items": {}, "uniqueItems": False}, None),
        (True, None),
    ],
)
def test_what_is_taken(schema: Any, wanted: Any) -> None:
    assert enforced_schema(schema, "s") == (schema if wanted is None else wanted)
