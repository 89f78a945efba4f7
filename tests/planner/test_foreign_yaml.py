"""YAML of users: whatever it is, it is read as PyYAML reads it, or refused with its line."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenspeed_plan.planner.advisor.engine_profile import load_engine
from tokenspeed_plan.planner.commands.predict import search
from tokenspeed_plan.planner.compile import find_model
from tokenspeed_plan.planner.foreign_yaml import MAX_DEPTH, NotYaml, read_yaml
from tokenspeed_plan.planner.machines.hardware import known_profiles, load_profile, to_hardware
from tokenspeed_plan.planner.spec import load_spec
from tokenspeed_plan.plans.errors import TokenspeedError

TIMES = int(os.environ.get("TOKENSPEED_FUZZ", "1"))
SPEC = """version: 1
model: {preset: qwen3-0.6b}
target: {gpu: cpu, count: 1}
parallelism: auto
workload:
  kind: batch
  first_turn_tokens: 64
  turn_tokens: 0
  turns: 1
  output_tokens: 16
  concurrency: 2
  skew: 0.5
objective: {minimize: tpot}
slo: {ttft_ms: 200.5}
speculation: off
disaggregation: off
serving: {prefill_chunk: 64}
"""
ENGINE = (
    "name: x\nversion: '1'\nformat: bf16\nstate_dtype: fp32\nhides_shared_expert: true\n"
    "small_kernels: {delta: 1, attention: 1, experts: 1, dense: 1, quantised: 1, step: 1}\n"
    "collectives_per_layer: 2\nhost_us_per_step: 0.5\npolling_ms: 0\nfront_end_ms: 1\n"
    "front_end_us_per_token: 1\n"
    "prefill: {captured_tokens: 1, captured_us_per_layer: 1, eager_us_per_layer: 1, "
    "host_us_per_step: 1}\n"
    "sources: {state_dtype: a, small_kernels: a, collectives_per_layer: a, prefill: a, "
    "host_us_per_step: a, polling_ms: a, front_end_ms: a, front_end_us_per_token: a, "
    "hides_shared_expert: a}\n"
)
NASTY = [
    '!!int ""',
    '!!float ""',
    '!!int "x"',
    '!!float "1:x"',
    '!!bool "x"',
    '!!timestamp "x"',
    '!!binary "\u00e9"',
    "!!omap x",
    "!!set [x]",
    "!!python/object:os.system {}",
    "!!int {=: 3}",
    "2020-13-45",
    "9" * 30,
    "9" * 5000,
    "-1",
    "1e308",
    "1.0e+400",
    ".nan",
    ".inf",
    "-.inf",
    "0x" + "f" * 400,
    "~",
    '""',
    '"\\0"',
    '"\\ud800"',
    '"\\e[31m"',
    "x" * 2000,
    "../" * 100,
    "[" * 300,
    "&a [*a]",
    "*a",
    "{<<: {a: 1}}",
    "? [a]\n: 1",
    "true",
    "0",
    "1",
    "3",
    "7",
    "64",
    "1024",
    "100000000",
    "auto",
    "fp8",
    "H100",
    "\t",
    "#",
    "\ufeff",
    "\x00",
    "\x1b",
    "\u0085",
    "é",
]
WORDS = re.compile(r"[\w.-]+")


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ('a: !!int ""', 1, "`int`"),
        ('a: 1\nb: !!float ""', 2, "`float`"),
        ('a: 1\nb: [\n!!timestamp "x"]', 3, "`timestamp`"),
        ('a: !!bool "x"', 1, "`bool`"),
        ("a: 1\nb: 2\na: 3", 3, "`a` is given twice, first in line 1"),
        ("a: 1\nb:\n  - {x: 1, y: 2,\n     'x': 3}", 4, "`x` is given twice, first in line 3"),
        ("a: 1\nb: " + "9" * 5000, 2, "`int`"),
        ("[" * 5000, 1, f"more than {MAX_DEPTH} levels"),
        ("a: &a [*a]", 1, "part of"),
        ("a: *b", 1, "alias"),
        ("a: 1\nb: \0", 2, "U+0000"),
        ("a: 1\nb: \udcff", 2, "U+DCFF"),
        ('a: 1\n"\\ud800": 1', 2, "surrogate"),
        ("a: 1\nb: [", 2, "<stream end>"),
        ("--- 1\n--- 2", 2, "another document"),
        ("x: !!python/object:os.system {}", 1, "constructor"),
        ("? [a]\n: 1", 1, "unhashable"),
        ("a: " + "x" * 2_000_000, None, "characters"),
    ],
)
def test_a_refusal_has_its_line(text: str, line: int | None, says: str) -> None:
    with pytest.raises(NotYaml) as caught:
        read_yaml(text)
    assert caught.value.line == line
    assert says in caught.value.problem
    assert "\n" not in caught.value.problem and len(caught.value.problem) < 400


@pytest.mark.parametrize("merge", ["[{0}]", "{{<<: [{0}]}}"])
def test_a_bomb_of_aliases_is_refused(merge: str) -> None:
    lines = ["a0: &a0 {x: 1}"]
    for i in range(1, 30):
        lines.append(f"a{i}: &a{i} {merge.format(', '.join([f'*a{i - 1}'] * 9))}")
    with pytest.raises(NotYaml, match="aliases"):
        read_yaml("\n".join(lines))


@pytest.mark.parametrize(
    "text",
    [
        SPEC,
        ENGINE,
        *known_profiles().values(),
        "\ufeffa: 1",
        "a: 1\r\nb: {}\r\n",
        "b: &b {x: 1}\nc: {<<: *b, x: 2}\n",
        "b: &b {x: 1}\no: {y: {a: &a {<<: *b, x: 1}}}\nc: {<<: *a}\n",
        "[" * MAX_DEPTH + "]" * MAX_DEPTH,
    ],
)
def test_what_is_taken_is_what_yaml_says(text: str) -> None:
    assert read_yaml(text) == yaml.safe_load(text)


def test_files_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"version: 1\nmodel: \xff")
    for load in (load_spec, load_engine, load_profile):
        with pytest.raises(TokenspeedError, match=r"x.yaml:2`: not UTF-8"):
            load(path)
        with pytest.raises(TokenspeedError, match="cannot read"):
            load(Path("a\0b"))


@st.composite
def mutated(draw: st.DrawFn, text: str) -> str:
    """The text with a few words replaced or something put between them."""
    for _ in range(draw(st.integers(1, 3))):
        words = list(WORDS.finditer(text))
        if not words:
            return text
        word = draw(st.sampled_from(words))
        nasty = draw(st.sampled_from(NASTY) | st.text(max_size=5))
        start = draw(st.sampled_from([word.start(), word.end()]))
        text = text[:start] + nasty + text[word.end() :]
    return text


def is_refused_in_one_line(error: TokenspeedError) -> None:
    assert error.message and error.hint
    for line in (error.message, error.hint):
        assert "\n" not in line and len(line) < 20_000
        assert line.isprintable(), line


@settings(max_examples=60 * TIMES, deadline=None)
@given(data=st.data())
def test_a_mutated_spec_is_predicted_or_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.yaml"
    text = data.draw(mutated(SPEC))
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        spec = load_spec(path)
        search(spec, find_model(spec, path).config)
    except TokenspeedError as error:
        is_refused_in_one_line(error)


@settings(max_examples=60 * TIMES, deadline=None)
@given(data=st.data())
def test_a_mutated_profile_or_engine_is_read_or_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.yaml"
    profile = (ROOT / "planner/machines/profiles/cpu.yaml").read_text(encoding="utf-8")
    text = data.draw(mutated(data.draw(st.sampled_from([profile, ENGINE]))))
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_engine(path)
    except TokenspeedError as error:
        is_refused_in_one_line(error)
    try:
        hardware = to_hardware(load_profile(path))
    except TokenspeedError as error:
        is_refused_in_one_line(error)
        return
    assert min(hardware.page_size, hardware.prefill_chunk, hardware.gpus_per_node) >= 1
