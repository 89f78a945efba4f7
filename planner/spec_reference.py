"""The reference of the spec, made from its models: `docs/spec.md`, a JSON schema, one key."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.text import printable_line

Schema = Mapping[str, Any]
HEAD = """# The spec

A spec is a YAML file that says what to serve, on what, and what for; `tokenspeed plan` makes a plan
of it. `examples/` has some. `tokenspeed spec` prints this page, `tokenspeed spec --explain KEY` one
key of it, and `tokenspeed spec --schema` [the JSON schema](spec.schema.json) for editors. All of
them are made from the models that read a spec, in `planner/spec.py`.

A key that is left out has its default. A key that is not here is refused.
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One key.

    Attributes:
        key: with the sections that it is in, such as `workload.turns`.
        default: as YAML writes it; None where the key must be given.
        is_section: whether it may have keys of its own.
    """

    key: str
    meaning: str
    type: str
    unit: str
    default: str | None
    example: str
    is_section: bool


@dataclass(frozen=True, slots=True)
class Section:
    """Keys that are written together; that of the whole spec has an empty name."""

    name: str
    meaning: str
    entries: tuple[Entry, ...]


def json_schema() -> dict[str, Any]:
    """The JSON schema of a spec."""
    schema = Spec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


@cache
def sections() -> tuple[Section, ...]:
    """All sections in the order of the models, each before those inside of it."""
    schema = json_schema()
    return tuple(_sections("", schema, schema["$defs"]))


def _sections(name: str, section: Schema, models: Schema) -> Iterator[Section]:
    entries, inner = [], []
    for key, about in section["properties"].items():
        path = f"{name}.{key}".removeprefix(".")
        model = _model_of(about, models)
        entries.append(_entry(path, about, key in section.get("required", ()), model is not None))
        if model is not None:
            inner.append((path, model))
    yield Section(name, section["description"], tuple(entries))
    for path, model in inner:
        yield from _sections(path, model, models)


def _choices(about: Schema) -> list[Schema]:
    """The forms that a value may take."""
    return [choice for choice in about.get("anyOf", [about]) if choice.get("type") != "null"]


def _model_of(about: Schema, models: Schema) -> Schema | None:
    """The model of a section; None for a plain key."""
    for choice in _choices(about):
        if "$ref" in choice:
            name = choice["$ref"].rpartition("/")[2]
            model: Schema = models[name]
            return model
    return None


def _entry(key: str, about: Schema, is_required: bool, is_section: bool) -> Entry:
    default = None
    if not is_required:
        default = _yaml(about.get("default"))
    return Entry(
        key,
        about["description"],
        " or ".join(dict.fromkeys(map(_type, _choices(about)))),
        about.get("unit", ""),
        default,
        _yaml(about["examples"][0]),
        is_section,
    )


def _type(choice: Schema) -> str:
    """A form of a value in words."""
    if "$ref" in choice:
        return "section"
    if "const" in choice:
        return f"`{choice['const']}`"
    if "enum" in choice:
        return " or ".join(f"`{word}`" for word in choice["enum"])
    if choice["type"] == "array":
        item = _type(choice["items"])
        return f"list of {choice['minItems']} to {choice['maxItems']}, each a {item}"
    names = {
        "boolean": "true or false",
        "integer": "whole number",
        "number": "number",
        "string": "text",
    }
    return names[choice["type"]] + _bounds(choice)


def _bounds(choice: Schema) -> str:
    if "maximum" not in choice:
        return ""
    if "exclusiveMinimum" in choice:
        return f" over {choice['exclusiveMinimum']:g}, up to {choice['maximum']:g}"
    return f" from {choice['minimum']:.10g} to {choice['maximum']:.10g}"


def _yaml(value: Any) -> str:
    """The value as a flow of YAML on one line."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        inner = ", ".join(
            f"{key}: {_yaml(part)}" for key, part in value.items() if part is not None
        )
        return f"{{{inner}}}"
    if isinstance(value, str):
        return value
    return json.dumps(value, allow_nan=False)


def as_markdown() -> str:
    """The page `docs/spec.md`."""
    parts = [HEAD]
    for section in sections():
        title = f"`{section.name}`" if section.name else "The keys of a spec"
        rows = "\n".join(map(_row, section.entries))
        head = "| key | meaning | value | default | example |\n| --- | --- | --- | --- | --- |"
        parts.append(f"## {title}\n\n{section.meaning}\n\n{head}\n{rows}\n")
    return "\n".join(parts)


def _row(entry: Entry) -> str:
    name = entry.key.rpartition(".")[2]
    default = "must be given" if entry.default is None else f"`{entry.default}`"
    cells = (f"`{name}`", entry.meaning, _value(entry), default, f"`{name}: {entry.example}`")
    return f"| {' | '.join(cells)} |"


def _value(entry: Entry) -> str:
    if entry.unit:
        return f"{entry.type}; {entry.unit}"
    return entry.type


def explain(key: str) -> str:
    """What one key means, and the keys inside of it.

    Raises:
        SpecError: a spec has no such key.
    """
    entries = {entry.key: entry for section in sections() for entry in section.entries}
    if key not in entries:
        raise _unknown(key, entries)
    entry = entries[key]
    lines = [f"{key}: {entry.meaning}", f"  value:   {_value(entry).replace('`', '')}"]
    lines.append(f"  default: {entry.default or 'it must be given'}")
    lines.append(f"  example: {_example(entry)}")
    for section in sections():
        if section.name == key:
            lines += [
                f"  .{each.key.rpartition('.')[2]}: {each.meaning}" for each in section.entries
            ]
    return "\n".join(lines)


def _example(entry: Entry) -> str:
    *folders, name = entry.key.split(".")
    text = f"{name}: {entry.example}"
    for folder in reversed(folders):
        text = f"{folder}: {{{text}}}"
    return text


def _unknown(key: str, entries: Mapping[str, Entry]) -> SpecError:
    last = key.rpartition(".")[2]
    same = [known for known in entries if known.rpartition(".")[2] == last]
    near = sorted(same, key=len) or difflib.get_close_matches(key, entries, 1)
    hint = "`tokenspeed spec` lists the keys"
    if near:
        hint = f"did you mean `{near[0]}`?"
    return SpecError(f"a spec has no key `{printable_line(key)}`", hint)
