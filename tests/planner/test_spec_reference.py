"""The reference of the spec is current, complete, and its examples are specs."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from conftest import ROOT

from tokenspeed_plan.planner.spec import Spec, parse_spec
from tokenspeed_plan.planner.spec_reference import (
    Entry,
    as_markdown,
    explain,
    json_schema,
    sections,
)
from tokenspeed_plan.plans.errors import SpecError

ENTRIES = [entry for section in sections() for entry in section.entries]
BASE: dict[str, Any] = {"version": 1, "model": {"preset": "qwen3.5-9b"}, "target": {"gpu": "cpu"}}
# Keys that need another one beside them.
BESIDE: dict[str, dict[str, Any]] = {
    "model.path": {"model": {}},
    "disaggregation.prefill": {"disaggregation": {"decode": 1}},
    "disaggregation.decode": {"disaggregation": {"prefill": 1}},
    "disaggregation.answers": {"disaggregation": {"prefill": 1, "decode": 1}},
    **{
        f"workload.{key}.{name}": {"workload": {key: {"mean": 1000, "p95": 3000, "max": 8000}}}
        for key in ("first_turn_tokens", "output_tokens")
        for name in ("mean", "p95", "max")
    },
    "parallelism.attention.dp": {"parallelism": {"attention": {"tp": 1}}},
    "parallelism.attention.context_split": {"parallelism": {"attention": {"tp": 1}}},
}


def test_the_pages_are_current() -> None:
    """`tokenspeed spec > docs/spec.md` and `--schema > docs/spec.schema.json` make them."""
    assert (ROOT / "docs/spec.md").read_text(encoding="utf-8") == as_markdown()
    schema = json.loads((ROOT / "docs/spec.schema.json").read_text(encoding="utf-8"))
    assert schema == json_schema()


def test_every_key_is_explained() -> None:
    keys = {entry.key for entry in ENTRIES}
    assert {
        "slo.tpot_ms",
        "objective.slo.ttft_ms",
        "workload.arrivals_per_s",
        "workload.skew",
    } <= keys
    assert {"serving.kv_dtype", "serving.checkpoint_tokens", "speculation.rollback"} <= keys
    assert len(keys) == len(ENTRIES) > 35
    for entry in ENTRIES:
        assert entry.meaning.endswith(".") and entry.type and entry.example
        assert entry.meaning in explain(entry.key)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.key)
def test_an_example_is_taken(entry: Entry) -> None:
    data: dict[str, Any] = json.loads(json.dumps(BASE | BESIDE.get(entry.key, {})))
    *folders, last = entry.key.split(".")
    inner = data
    for folder in folders:
        inner = inner.setdefault(folder, {})
    inner[last] = yaml.safe_load(entry.example)
    spec = Spec.model_validate(data)
    value: Any = spec.model_dump(mode="json", exclude_none=True)
    for part in entry.key.split("."):
        value = value[part]
    if not isinstance(value, dict):
        assert value == inner[last] or (value, inner[last]) == ("off", False)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.key)
def test_a_default_is_what_is_taken_without_the_key(entry: Entry) -> None:
    if entry.is_section or "." not in entry.key:
        return
    section, name = entry.key.rpartition(".")[::2]
    model: Any = {name: model for name, model in MODELS.items() if name == section}[section]
    field = model.model_fields[name]
    assert field.is_required() == (entry.default is None)
    if entry.default is not None:
        assert yaml.safe_load(entry.default.replace("none", "~")) == field.default


def models() -> dict[str, Any]:
    """The model of each section, by its name, read from the annotations."""
    found: dict[str, Any] = {}

    def visit(name: str, model: Any) -> None:
        found[name] = model
        for key, field in model.model_fields.items():
            for part in getattr(field.annotation, "__args__", (field.annotation,)):
                if hasattr(part, "model_fields"):
                    visit(f"{name}.{key}".removeprefix("."), part)

    visit("", Spec)
    return found


MODELS = models()


def test_sections_are_those_of_the_models() -> None:
    assert [section.name for section in sections()] == list(MODELS)


@pytest.mark.parametrize(
    "change",
    [
        {"workload": {"turns": 0}},
        {"speculation": {"acceptance": [0.5, 7]}},
        {"parallelism": {"attention": {"tp": "x"}}},
        {"serving": {"kv_dtype": "int3"}},
        {"objective": {"slo": {"tpot_ms": -1}}},
        {"slo": 3},
    ],
)
def test_the_hint_of_a_refusal_leads_to_the_key(change: dict[str, Any]) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(yaml.safe_dump(BASE | change), "spec")
    found = re.search(r"`tokenspeed spec --explain (\S+)`", caught.value.hint)
    assert found is not None
    assert explain(found.group(1)).startswith(f"{found.group(1)}: ")


def test_an_unknown_key_names_a_near_one() -> None:
    for key, near in (("tpot_ms", "`slo.tpot_ms`"), ("workload.turn", "`workload.turns`")):
        with pytest.raises(SpecError) as caught:
            explain(key)
        assert near in caught.value.hint
