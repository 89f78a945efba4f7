"""Values of arguments that a model writes as plain text -> JSON, by the tool's schema."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

Json = dict[str, Any]

_OF_WORDS = ("enum", "const", "pattern", "format")
_MAX_DEPTH = 8  # of schemas in each other
_INTEGER = re.compile(r"-?(?:0|[1-9]\d*)", re.ASCII)
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
_BOOLEANS = {"true": "true", "false": "false", "1": "true", "0": "false"}
_TYPES: dict[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    dict: "object",
    list: "array",
    type(None): "null",
}


def types_of(schema: Any, root: Any) -> tuple[str, ...]:
    """The types that a JSON schema allows, in its order; none if it does not say.

    Args:
        schema: of one argument.
        root: of all arguments; `$ref` points into it.
    """
    return tuple(dict.fromkeys(_types(schema, root, _MAX_DEPTH)))


def is_word(schema: Any, root: Any) -> bool:
    """Whether a schema says what its strings are, so that space around one means nothing.

    Args:
        schema: of one argument.
        root: of all arguments; `$ref` points into it.
    """
    if not isinstance(schema, dict):
        return False
    target = _target(schema.get("$ref"), root) if "$ref" in schema else schema
    return isinstance(target, dict) and any(name in target for name in _OF_WORDS)


def _types(schema: Any, root: Any, depth: int) -> Iterator[str]:
    if not isinstance(schema, dict) or not depth:
        return
    yield from _types(_target(schema.get("$ref"), root), root, depth - 1)
    declared = schema.get("type")
    if isinstance(declared, str):
        yield declared
    elif isinstance(declared, list):
        yield from (name for name in declared if isinstance(name, str))
    else:
        yield from _implied(schema)
    for union in ("anyOf", "oneOf", "allOf"):
        for choice in _listed(schema.get(union)):
            yield from _types(choice, root, depth - 1)
    if schema.get("nullable") is True:
        yield "null"


def _implied(schema: Json) -> Iterator[str]:
    """Types that a schema has without naming them."""
    values = _listed(schema.get("enum"))
    if "const" in schema:
        values = [*values, schema["const"]]
    for value in values:
        yield _TYPES[type(value)]
    if "properties" in schema:
        yield "object"
    if "items" in schema:
        yield "array"


def _listed(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    return []


def _target(reference: Any, root: Any) -> Any:
    """What a `$ref` such as `#/$defs/Name` means; None if it leads nowhere."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found = root
    for name in reference.split("/")[1:]:
        if not isinstance(found, dict):
            return None
        found = found.get(name.replace("~1", "/").replace("~0", "~"))
    return found


def to_json(text: str, types: tuple[str, ...]) -> str:
    """A value as JSON: of the first type that it can be, else a string.

    What is JSON already stays as it is, to the byte, but for the space around it.
    """
    bare = text.strip()
    if "null" in types and bare in ("null", "None"):
        return "null"
    for name in types or ("object", "array"):
        if name == "string":
            break
        found = _CASTS.get(name, _nothing)(bare)
        if found is not None:
            return found
    return json.dumps(text, ensure_ascii=False, allow_nan=False)


def _nothing(text: str) -> None:
    return None


def _integer(text: str) -> str | None:
    if _INTEGER.fullmatch(text):
        return text
    try:
        value = float(text)
        if value.is_integer():
            return str(int(value))
    except (ValueError, OverflowError):
        pass
    return None


def _number(text: str) -> str | None:
    try:
        value = float(text)
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    if _NUMBER.fullmatch(text):
        return text
    return repr(value)


def _boolean(text: str) -> str | None:
    return _BOOLEANS.get(text.lower())


def _object(text: str) -> str | None:
    return _nested(text, dict)


def _array(text: str) -> str | None:
    return _nested(text, list)


def _nested(text: str, wanted: type) -> str | None:
    """An object or a list, as JSON or as Python writes it."""
    try:
        if isinstance(strict_json(text), wanted):
            return text
        return None
    except ValueError:
        pass
    try:
        value = ast.literal_eval(text)
        if isinstance(value, wanted):
            return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        pass
    return None


_CASTS: dict[str, Callable[[str], str | None]] = {
    "integer": _integer,
    "number": _number,
    "boolean": _boolean,
    "object": _object,
    "array": _array,
}


def strict_json(text: str) -> Any:
    """A JSON value.

    Raises:
        ValueError: it is none; nor are NaN and infinity.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
