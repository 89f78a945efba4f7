"""JSON schemas of answers: what of them can be enforced. All else is refused, so that none is lost.

What is enforced may be narrower than the schema: properties come in their order and,
where some are listed, no others do; a pattern is of the whole string.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Json = dict[str, Any]

MAX_SCHEMAS = 5000  # in each other
MAX_REPEATS = 1000  # that a pattern states: each is a state of the grammar
_REPEATS = re.compile(r"\{(\d{0,7}),?(\d{0,7})")
MAX_STEP = 1000  # of `multipleOf`; XGrammar drops those over about 4,000
MAX_COUNT = 100_000  # of characters, items or properties
# Say something of an instance that no grammar here looks at.
_NEVER = (
    "not",
    "if",
    "then",
    "else",
    "contains",
    "dependencies",
    "dependentRequired",
    "dependentSchemas",
    "unevaluatedItems",
    "unevaluatedProperties",
    "$dynamicRef",
    "$recursiveRef",
)
# Where one of these is, what stands beside it would be lost.
_ALONE = ("$ref", "anyOf", "oneOf", "allOf")
_OF_STRINGS = ("pattern", "format")
_LENGTHS = ("minLength", "maxLength")
_COUNTS = (*_LENGTHS, "minItems", "maxItems", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_CONSTRAINTS = frozenset(
    (
        *_ALONE,
        *_OF_STRINGS,
        *_COUNTS,
        *_BOUNDS,
        "multipleOf",
        "type",
        "enum",
        "const",
        "properties",
        "required",
        "additionalProperties",
        "patternProperties",
        "propertyNames",
        "items",
        "prefixItems",
    )
)
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_ONES = ("items", "additionalProperties", "propertyNames")


class SchemaError(ValueError):
    """A schema that cannot be enforced; says where and why."""


def enforced_schema(schema: Any, place: str) -> Any:
    """A schema as the grammar's library takes it, with what it would read otherwise spelled out.

    Raises:
        SchemaError: it is no schema, or a part of it cannot be enforced.
    """
    return _Reader().read(schema, place)


class _Reader:
    """Reads one schema and those in it."""

    def __init__(self) -> None:
        self._num_read = 0

    def read(self, schema: Any, place: str) -> Any:
        """The schema, checked."""
        self._num_read += 1
        if self._num_read > MAX_SCHEMAS:
            raise SchemaError(f"`{place}`: there are over {MAX_SCHEMAS} schemas in it")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise SchemaError(f"`{place}`: a schema is an object")
        _check_keywords(schema, place)
        _check_values(schema, place)
        found = schema | self._inner(schema, place)
        if "array" in _types(schema) and "items" not in found:
            found["items"] = "prefixItems" not in found
        return found

    def _inner(self, schema: Json, place: str) -> Json:
        """The schemas in it, checked."""
        found: Json = {}
        for name in _MAPS:
            if name in schema:
                found[name] = self._map(schema[name], f"{place}.{name}")
        for name in _LISTS:
            if name in schema:
                found[name] = self._list(schema[name], f"{place}.{name}")
        for name in _ONES:
            if name in schema:
                found[name] = self.read(schema[name], f"{place}.{name}")
        return found

    def _map(self, schemas: Any, place: str) -> Json:
        if not isinstance(schemas, dict):
            raise SchemaError(f"`{place}`: input should be an object of schemas")
        return {name: self.read(schema, f"{place}.{name:.40}") for name, schema in schemas.items()}

    def _list(self, schemas: Any, place: str) -> list[Any]:
        if not isinstance(schemas, list) or not schemas:
            raise SchemaError(f"`{place}`: input should be a list of schemas")
        return [self.read(schema, f"{place}[{number}]") for number, schema in enumerate(schemas)]


def _types(schema: Json) -> list[Any]:
    stated = schema.get("type")
    return stated if isinstance(stated, list) else [stated]


def _check_keywords(schema: Json, place: str) -> None:
    """Refuse what the library would pass over.

    Raises:
        SchemaError: with the keyword.
    """
    for name in _NEVER:
        if name in schema:
            raise SchemaError(f"`{place}.{name}` cannot be enforced")
    if schema.get("uniqueItems"):
        raise SchemaError(f"`{place}.uniqueItems` cannot be enforced")
    for name in _ALONE:
        beside = sorted(_CONSTRAINTS & schema.keys() - {name})
        if name in schema and beside:
            raise SchemaError(f"`{place}.{beside[0]}` beside `{name}` cannot be enforced")
    for name in _OF_STRINGS:
        for other in (*_LENGTHS, *_OF_STRINGS):
            if name in schema and other in schema and other != name:
                raise SchemaError(f"`{place}`: `{other}` beside `{name}` cannot be enforced")
    if "multipleOf" in schema and schema.get("type") != "integer":
        raise SchemaError(f"`{place}.multipleOf` is only enforced of integers")


def _check_ref(value: Any) -> str | None:
    if not isinstance(value, str) or not value.startswith("#"):
        return "only references into the schema itself, `#/...`, are followed"
    return None


def _check_all_of(value: Any) -> str | None:
    if isinstance(value, list) and len(value) > 1:
        return "several schemas at once cannot be enforced"
    return None


def _check_pattern(value: Any) -> str | None:
    if not isinstance(value, str):
        return "a pattern is a string"
    if len(value) > 1024:
        return "a pattern has at most 1024 characters"
    if "(?" in value.replace("(?:", ""):
        return "groups that look around cannot be enforced"
    if '"' in value or "\\\\" in value:
        return "quotes and backslashes in a pattern cannot be enforced"
    counts = [count for pair in _REPEATS.findall(value) for count in pair]
    if any(int(count or 0) > MAX_REPEATS for count in counts):
        return f"a pattern repeats a part at most {MAX_REPEATS} times"
    return None


def _check_required(value: Any) -> str | None:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        return "input should be a list of names"
    return None


def _check_type(value: Any) -> str | None:
    stated = value if isinstance(value, list) else [value]
    known = ("object", "array", "string", "number", "integer", "boolean", "null")
    if not stated or not all(isinstance(kind, str) and kind in known for kind in stated):
        return "input should be a type of JSON"
    return None


def _check_enum(value: Any) -> str | None:
    if not isinstance(value, list) or not value:
        return "input should be a list of values"
    return None


def _check_count(value: Any) -> str | None:
    is_count = isinstance(value, int) and not isinstance(value, bool)
    if not is_count or not 0 <= value <= MAX_COUNT:
        return f"input should be an integer from 0 to {MAX_COUNT}"
    return None


def _check_bound(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e15:
        return "input should be a number up to 1e15"
    return None


def _check_step(value: Any) -> str | None:
    is_step = isinstance(value, int) and not isinstance(value, bool)
    if not is_step or not 1 <= value <= MAX_STEP:
        return f"only integers from 1 to {MAX_STEP} are enforced"
    return None


_CHECKS: Mapping[str, Callable[[Any], str | None]] = {
    "$ref": _check_ref,
    "allOf": _check_all_of,
    "pattern": _check_pattern,
    "required": _check_required,
    "type": _check_type,
    "enum": _check_enum,
    **dict.fromkeys(_COUNTS, _check_count),
    **dict.fromkeys(_BOUNDS, _check_bound),
    "multipleOf": _check_step,
}


def _check_values(schema: Json, place: str) -> None:
    """Refuse values that mean nothing, or that would be read otherwise.

    Raises:
        SchemaError: with the keyword.
    """
    for name, check in _CHECKS.items():
        fault = check(schema[name]) if name in schema else None
        if fault is not None:
            raise SchemaError(f"`{place}.{name}`: {fault}")
    listed = schema.get("properties", {})
    if isinstance(listed, dict):
        for name in schema.get("required", []):
            if name not in listed:
                raise SchemaError(f"`{place}.required`: `{name:.40}` is not in `properties`")
