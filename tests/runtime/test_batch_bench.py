"""The batch benchmark on the demo model: its tokens, steps and lengths are those asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import ROOT

from tokenspeed_plan.planner.advisor.plan_prices import batch_prediction, step_prediction
from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.plans.bundle import load_plan

pytestmark = pytest.mark.slow  # whole processes, or whole models

BENCH = (
    "bench",
    str(ROOT / "plans/frozen/demo-cpu"),
    "--workload",
    "batch",
    "--weights",
    str(ROOT / "examples/demo/model"),
)


def found_of(*options: str) -> Any:
    done = CliRunner().invoke(main, [*BENCH, *options, "--json"], catch_exceptions=False)
    return json.loads(done.stdout)


def test_all_rows_run_and_all_steps_are_counted() -> None:
    found = found_of("--rows", "20", "--prompt", "9", "--out", "5")
    assert (found["rows"], found["tokens_in"], found["tokens_out"]) == (20, 180, 100)
    assert found["tokens_per_s_out"] == pytest.approx(100 / found["wall_s"])
    assert 0.0 <= found["idle_share"] < 1.0
    programs = found["programs"]
    assert sum(program["steps"] for program in programs) == found["steps"]
    decoded = [program["steps"] for program in programs if program["phase"] == "decode"]
    assert sum(decoded) == found["decode_steps"]
    # The device is busy for what its steps take.
    busy_s = sum(program["steps"] * program["us"] for program in programs) * 1e-6
    assert busy_s < found["wall_s"]
    for program in programs:
        assert program["us"] <= program["p95_us"] * len(programs) * found["steps"]
        assert program["share_of_floor"] == pytest.approx(program["floor_us"] / program["us"])
        assert program["predicted_us"] > 0


def test_the_forecast_is_the_planners_own_and_comes_first() -> None:
    """That of all rows, whatever the machine then takes; it is told before the run."""
    bundle = Path(BENCH[1])
    shape = ("--rows", "6", "--prompt", "9", "--out", "5")
    own = batch_prediction(load_plan(bundle), bundle, [(9, 5)] * 6)
    assert found_of(*shape)["predicted"] == own
    done = CliRunner().invoke(main, [*BENCH, *shape], catch_exceptions=False)
    assert done.stderr.startswith(f"predicted: {own['output_tokens_per_s']:g} tokens/s out, ")
    assert f"(predicted {own['output_tokens_per_s']:.1f}, off by " in done.stdout


def test_prompts_that_share_a_step_are_priced_as_short_ones() -> None:
    """Attention of many prompts costs less than that of one with all their tokens."""
    bundle = ROOT / "plans/frozen/qwen3.5-35b-h200"
    plan = load_plan(bundle)
    many, one = (step_prediction(plan, bundle, "prefill", 8192, n, 8192 // n) for n in (16, 1))
    assert many["predicted_kinds_us"]["matrix"] < 0.97 * one["predicted_kinds_us"]["matrix"]


def test_lengths_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    path.write_text(
        '{"prompt_tokens": 3, "output_tokens": 2}\n{"prompt_tokens": 8}\n', encoding="utf-8"
    )
    found = found_of("--lengths", str(path), "--out", "4", "--rows", "3")
    assert (found["tokens_in"], found["tokens_out"]) == (3 + 8 + 3, 2 + 4 + 2)
    text = CliRunner().invoke(main, [*BENCH, "--lengths", str(path)], catch_exceptions=False).stdout
    assert text.startswith("2 rows, 11 tokens in, 258 out, in ")
    assert "device idle" in text and "prefill/" in text and "predicted" in text


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("nonsense", "lengths.jsonl:1` is no JSON object"),
        ('{"prompt_tokens": 3, "output_tokens": 2}\n{"prompt_tokens": 0}', "lengths.jsonl:2`"),
        ("", "no rows"),
        ('{"prompt_tokens": 100000}', "longer than the plan's"),
    ],
)
def test_bad_lengths_are_one_error(line: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    path.write_text(line, encoding="utf-8")
    done = CliRunner().invoke(main, [*BENCH, "--lengths", str(path)])
    assert done.exit_code == 2 and done.output.startswith("error: ") and "hint: " in done.output
    assert says in done.output


def test_a_file_that_is_not_there_is_one_error(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, [*BENCH, "--lengths", str(tmp_path / "no.jsonl")])
    assert done.exit_code == 2 and done.output.startswith("error: ") and "no.jsonl" in done.output
