"""The agentic benchmark on the demo model: most prompt tokens come from the cache."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner
from conftest import ROOT

from tokenspeed_plan.planner.cli import main

BENCH = (
    "bench",
    str(ROOT / "plans/frozen/demo-cpu"),
    "--workload",
    "agentic",
    "--weights",
    str(ROOT / "examples/demo/model"),
    "--turn-tokens",
    "16",
    "--output-tokens",
    "8",
)


@pytest.mark.slow
def test_an_agents_conversations_are_nine_tenths_cached() -> None:
    """The record's workload with a fiftieth of its tokens: 50,000 and 800 a turn."""
    options = ("--conversations", "2", "--first-turn-tokens", "1000", "--turns", "12", "--json")
    done = CliRunner().invoke(main, [*BENCH, *options], catch_exceptions=False)
    found = json.loads(done.output)
    assert found["hit_rate"] >= 0.9
    assert len(found["ttft_ms"]) == len(found["turn_time_ms"]) == 12
    assert {
        "tpot_ms",
        "host_us_per_step",
        "state_bytes_copied_per_step",
        "tokens_per_s_user",
    } <= set(found)


def test_as_text() -> None:
    options = ("--conversations", "1", "--first-turn-tokens", "40", "--turns", "2")
    text = CliRunner().invoke(main, [*BENCH, *options], catch_exceptions=False).output
    assert "1 conversations of 2 turns: 40 tokens, then 16 a turn, 8 out" in text
    assert "recurrent state never" in text
    assert re.search(r"TTFT: first turn [\d.]+ ms, second [\d.]+ ms\n", text)


@pytest.mark.slow
def test_a_conversation_too_long_is_one_error() -> None:
    done = CliRunner().invoke(main, [*BENCH, "--first-turn-tokens", "1270", "--turns", "3"])
    assert done.exit_code == 2 and done.output.startswith("error: ") and "hint: " in done.output


@pytest.mark.parametrize("option", ["--turns", "--conversations"])
def test_none_is_refused(option: str) -> None:
    assert CliRunner().invoke(main, [*BENCH, option, "0"]).exit_code == 2
