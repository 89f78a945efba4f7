"""How many machines a batch needs: checked by counting rows, not by the formula again."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import ROOT

from tokenspeed_plan.planner.advisor.fleet_size import (
    Job,
    fleet_for,
    parse_count,
    parse_seconds,
)
from tokenspeed_plan.planner.advisor.prediction import Prediction
from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.planner.commands.predict import search
from tokenspeed_plan.planner.models.config import load_preset
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.errors import SpecError


@cache
def best() -> Prediction:
    spec = Spec.model_validate(
        {
            "version": 1,
            "model": {"preset": "qwen3.5-9b"},
            "target": {"gpu": "H200", "count": 1},
            "workload": {"first_turn_tokens": 512, "output_tokens": 128, "concurrency": 16},
            "speculation": "off",
        }
    )
    return search(spec, load_preset("qwen3.5-9b")[0])[1].best


def rows_in_time(machines: int, seconds: float, prediction: Prediction) -> float:
    """Rows that so many machines answer, the last row of each in time."""
    rate = prediction.tokens_per_s / prediction.output_tokens / (1 + prediction.error)
    last_s = prediction.turn.turn_us * 1e-6 * (1 + prediction.error)
    return machines * rate * max(seconds - last_s, 0)


@pytest.mark.parametrize("rows", [1, 5000, 10_000_000])
@pytest.mark.parametrize("deadline_s", [60.0, 3600.0, 6 * 3600.0])
def test_a_fleet_is_in_time_and_one_machine_less_is_late(rows: int, deadline_s: float) -> None:
    fleet = fleet_for(Job(rows, deadline_s), best())
    assert fleet is not None
    assert fleet.total_s <= deadline_s * (1 + 1e-9)
    assert rows_in_time(fleet.machines, deadline_s, best()) >= rows * (1 - 1e-9)
    assert rows_in_time(fleet.machines - 1, deadline_s, best()) < rows
    hourly = best().price_per_hour * fleet.gpus
    assert fleet.cost_usd == pytest.approx(hourly * fleet.total_s / 3600)


def test_no_fleet_answers_faster_than_one_row() -> None:
    slow = replace(best(), turn=replace(best().turn, decode_us=1e9))
    assert fleet_for(Job(1, 60.0), slow) is None


@pytest.mark.parametrize(
    ("text", "rows"), [("7", 7), ("20000", 20000), ("500k", 500_000), ("1.5M", 1_500_000)]
)
def test_numbers_of_rows(text: str, rows: int) -> None:
    assert parse_count(text) == rows


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("90m", 5400), ("1.5d", 129600)])
def test_times(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "ten", "1e6", "6h", "9" * 400])
def test_what_is_no_number_of_rows(text: str) -> None:
    with pytest.raises(SpecError):
        parse_count(text)


@pytest.mark.parametrize("text", ["", "6", "0h", "-6h", "6 h", f"{'9' * 400}d"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(SpecError):
        parse_seconds(text)


def test_a_number_that_is_too_long_is_refused() -> None:
    result = cli("--count", "9" * 5000)
    assert result.exit_code == 2 and "is not a list of numbers" in result.output


def cli(*args: str) -> Any:
    spec = ROOT / "examples" / "qwen3.5-35b-h200" / "spec.yaml"
    return CliRunner().invoke(main, ["sweep", str(spec), "--gpus", "H200", *args])


def test_the_command_refuses_half_a_job_and_conversations() -> None:
    assert "go together" in cli("--rows", "10M").output
    changes = ("--set", "workload.kind=agentic", "--set", "workload.turns=12")
    assert "a batch of rows" in cli("--rows", "10M", "--deadline", "6h", *changes).output
