"""Service levels on percentiles: simulated on an outline of the plan, which has its scheduler."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import ROOT, make_spec
from frozen_plans import frozen_plan
from specs import merged

from tokenspeed_plan.planner import compile_plan, find_model
from tokenspeed_plan.planner.advisor import load_judge
from tokenspeed_plan.planner.advisor.candidate import Candidate, Knobs
from tokenspeed_plan.planner.advisor.load_judge import (
    Deployment,
    judged,
    most_arrivals,
    most_users,
    with_load,
)
from tokenspeed_plan.planner.advisor.plan_prices import kv_dtype_of, plan_pair, plan_steps
from tokenspeed_plan.planner.advisor.prediction import Prediction, Predictor
from tokenspeed_plan.planner.advisor.ranking import search_result
from tokenspeed_plan.planner.advisor.resolve import resolve
from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.ledger import Ledger
from tokenspeed_plan.planner.machines.hardware import find_hardware
from tokenspeed_plan.planner.models.config import load_preset
from tokenspeed_plan.planner.spec import Spec, load_spec, parse_spec
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.schema import Decision, Program

CHAT = {"kind": "agentic", "first_turn_tokens": 2000, "output_tokens": 100, "concurrency": 8}


@pytest.fixture(autouse=True)
def short_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_judge, "LEAST_REQUESTS", 80)


def spec_for(**changes: Any) -> Spec:
    data = {
        "version": 1,
        "model": {"preset": "qwen3.5-0.8b"},
        "target": {"gpu": "H200", "count": 1},
        "workload": CHAT,
        "speculation": "off",
    }
    return Spec.model_validate(merged(data, changes))


def predictor_of(spec: Spec) -> Predictor:
    return Predictor(spec, load_preset("qwen3.5-0.8b")[0], find_hardware("H200"))


def deployment_of(spec: Spec) -> Deployment:
    return Deployment(predictor_of(spec), Candidate(ParallelLayout(1, 1, 1), Knobs(2048, 64)), {})


@cache
def decided(text: str) -> tuple[dict[str, float], dict[str, Decision]]:
    spec, ledger = Spec.model_validate_json(text), Ledger()
    found = resolve(spec, load_preset("qwen3.5-0.8b")[0], find_hardware("H200"), ledger)
    return found.predicted.values, {each.name: each for each in ledger.decisions}


def decisions_for(**changes: Any) -> dict[str, Decision]:
    return decided(spec_for(**changes).model_dump_json(exclude_none=True))[1]


@pytest.mark.parametrize("example", ["demo", "qwen3.5-35b-h200"])
def test_an_outline_has_the_scheduler_of_the_plan(example: str) -> None:
    """The same limits, sizes of programs, and bytes of pages and state slots."""
    path = ROOT / "examples" / example / "spec.yaml"
    spec = load_spec(path)
    model = find_model(spec, path)
    plan = frozen_plan(example)
    limits = plan.pool.limits
    predictor = Predictor(
        spec.with_concurrency(limits.max_seqs),
        model.config,
        find_hardware(spec.target.gpu),
        rollback=limits.rollback,
    )
    depths = {each.bucket: each.depth for each in plan.pool.programs if each.phase == "decode"}
    stated = spec.serving.checkpoint_tokens if spec.serving else None
    knobs = Knobs(limits.max_tokens, limits.page_size, limits.max_depth, kv_dtype_of(plan), stated)
    candidate = Candidate(ParallelLayout(1, 1, 1), knobs)
    outline = Deployment(
        predictor, candidate, depths, limits.interleaved_tokens, limits.gathered_tokens
    ).outline
    assert outline.pool.limits == limits
    assert sizes_of(outline.pool.programs) == sizes_of(plan.pool.programs)
    for arena in ("kv_cache", "state"):
        assert outline.pool.slot_bytes(arena) == plan.pool.slot_bytes(arena)
    assert outline.model.eos_token_ids == plan.model.eos_token_ids


def sizes_of(programs: Sequence[Program]) -> list[tuple[Any, ...]]:
    names = ("phase", "bucket", "max_tokens", "max_seqs", "captured", "depth", "query_len")
    return [tuple(getattr(program, name) for name in names) for program in programs]


def test_an_outline_of_two_pools_is_that_of_the_plan() -> None:
    """Both pools, what each layer hands over and how fast, and which answers go back."""
    workload = {"kind": "agentic", "turns": 4, "turn_tokens": 40, "output_tokens": 64}
    spec = make_spec(
        ROOT / "examples/demo/model",
        target={"count": 2},
        disaggregation={"prefill": 1, "decode": 1, "answers": "return"},
        workload=workload | {"concurrency": 2},
    )
    model, alone = find_model(spec), ParallelLayout(1, 1, 1)
    plan = compile_plan(spec, model)
    predictor = Predictor(spec, model.config, find_hardware("cpu"))
    limits = plan.pool.limits
    knobs = Knobs(limits.max_tokens, limits.page_size, limits.max_depth, kv_dtype_of(plan))
    deployment = Deployment(predictor, Candidate(alone, knobs, alone), {})
    outline = deployment.outline
    for own, planned in zip(outline.pools, plan.pools, strict=True):
        assert own.limits == planned.limits
        assert sizes_of(own.programs) == sizes_of(planned.programs)
        for arena in ("kv_cache", "state"):
            assert own.slot_bytes(arena) == planned.slot_bytes(arena)
    found, pair = plan_pair(plan, plan_steps(plan, ROOT)), deployment.pair
    assert found is not None and pair is not None
    assert (pair.there, pair.back) == (found.there, found.back)
    own_returns, returns = outline.pools[1].answer_returns, plan.pools[1].answer_returns
    assert own_returns is not None and returns is not None
    assert own_returns.slots == returns.slots
    assert own_returns.token_us == pytest.approx(returns.token_us, rel=0.3)


@pytest.mark.parametrize(
    ("slo", "said"),
    [
        ({"ttft_p96_ms": 100.0}, "ttft_p96_ms"),
        ({"ttft_p95_ms": -1.0}, "ttft_p95_ms"),
        (
            {"tpot_p50_ms": 20.0, "tpot_p99_ms": 10.0},
            "`tpot_p99_ms` is 10, less than `tpot_p50_ms`",
        ),
    ],
)
def test_levels_that_mean_nothing_are_refused(slo: dict[str, float], said: str) -> None:
    text = json.dumps(spec_for().model_dump(exclude_none=True) | {"slo": slo})
    with pytest.raises(SpecError, match=said.replace("`", ".")):
        parse_spec(text, "a spec")


def test_both_places_of_levels_are_compared() -> None:
    objective = {"slo": {"ttft_p90_ms": 50.0}}
    with pytest.raises(ValueError, match="less than `ttft_p50_ms`"):
        spec_for(objective=objective, slo={"ttft_p50_ms": 60.0})
    spec = spec_for(objective=objective, slo={"ttft_p50_ms": 40.0, "tpot_ms": 9.0})
    assert spec.service_levels == {"ttft_p90_ms": 50.0, "ttft_p50_ms": 40.0, "tpot_ms": 9.0}


def test_a_plan_is_judged_by_its_load() -> None:
    """What is met or missed are the percentiles that the same load has without levels."""
    free = deployment_of(spec_for()).simulated(8, None)
    assert free["ttft_p50_ms"] <= free["ttft_p95_ms"] <= free["ttft_p99_ms"]
    for share, verdict in ((1.05, "met"), (0.2, "missed")):
        found = decisions_for(slo={"ttft_p95_ms": free["ttft_p95_ms"] * share})["service_levels"]
        assert found.value == verdict
        assert "of the turns of the simulated load" in found.reason
        numbers = found.options[0].numbers
        assert numbers["ttft_p95_ms"] == pytest.approx(free["ttft_p95_ms"], rel=0.02)
        assert f"ttft_p95_ms {numbers['ttft_p95_ms']:.4g}" in found.reason


def test_a_mean_says_too_little_of_a_percentile() -> None:
    """Arrivals at random times: the mean is within a level that one of a hundred is over."""
    changes = {"workload": {"arrivals_per_s": 40.0}}
    values, _ = decided(spec_for(**changes).model_dump_json(exclude_none=True))
    level = 1.2 * values["ttft_ms"]
    assert decisions_for(**changes, slo={"ttft_ms": level})["service_levels"].value == "met"
    found = decisions_for(**changes, slo={"ttft_p99_ms": level})["service_levels"]
    assert found.value == "missed"


def test_tokens_that_wait_for_prompts_get_a_limit() -> None:
    """A level on the slowest tokens is kept by less of a prompt between two of them."""
    long = {"workload": {"first_turn_tokens": 8000, "output_tokens": 60}}
    free = decisions_for(**long, slo={"tpot_p95_ms": 1e6})
    slow_ms = free["service_levels"].options[0].numbers["tpot_p95_ms"]
    limited = decisions_for(**long, slo={"tpot_p95_ms": 0.8 * slow_ms})["service_levels"]
    assert limited.value == "met"
    assert limited.options[0].numbers["tpot_p95_ms"] <= 0.8 * slow_ms


def test_leaders_are_simulated_until_one_stays_ahead() -> None:
    """Nobody who was not simulated is before the one who was taken."""
    predictor = predictor_of(spec_for(slo={"ttft_p95_ms": 50.0}))
    layout = ParallelLayout(1, 1, 1)
    tried = [predictor.predict(Candidate(layout, Knobs(chunk, 64))) for chunk in (512, 1024, 2048)]
    asked: list[Prediction] = []

    def deployed(prediction: Prediction) -> Deployment:
        asked.append(prediction)
        return Deployment(predictor, prediction.candidate, {})

    result = judged(search_result(predictor.spec, tuple(tried), ()), deployed)
    assert result.best.simulated is not None
    assert result.best.level("ttft_p95_ms") == result.best.simulated["ttft_p95_ms"]
    all_known = [with_load(each, Deployment(predictor, each.candidate, {})) for each in tried]
    assert result.excess(result.best) == min(map(result.excess, all_known))


def test_the_largest_load_within_the_levels() -> None:
    """One step more is over them."""
    spec = spec_for(workload={"concurrency": 4})
    deployment = deployment_of(spec)
    lone = deployment_of(spec_for(workload={"concurrency": 1})).simulated(1, None)
    levels = {"tpot_p95_ms": 2.0 * lone["tpot_p95_ms"]}
    users = most_users(deployment, levels)
    assert users is not None and users > 1
    many = int(users * 1.1) + 1
    assert not deployment_of(spec_for(workload={"concurrency": many})).within(levels, many, None)
    rate = most_arrivals(deployment, levels)
    assert rate is not None
    assert deployment.within(levels, None, rate) and not deployment.within(levels, None, 1.1 * rate)
    assert most_users(deployment, {"ttft_p50_ms": 1e-6}) is None


def test_two_pools_are_judged_by_both() -> None:
    """A lone user sees what formulas say; many see tokens that wait for no prompt."""
    two = {"target": {"count": 2}, "disaggregation": {"prefill": 1, "decode": 1}}
    alone, knobs = ParallelLayout(1, 1, 1), Knobs(2048, 64)
    lone = predictor_of(spec_for(**two, workload={"concurrency": 1}))
    pair = Candidate(alone, knobs, alone)
    found = Deployment(lone, pair, {}).simulated(1, None)
    assert found["ttft_ms"] == pytest.approx(lone.predict(pair).metrics["ttft_ms"], rel=0.1)
    many = predictor_of(spec_for(**two, workload={"first_turn_tokens": 8000}))
    both = Deployment(many, Candidate(alone, knobs), {}).simulated(8, None)
    split = with_load(many.predict(pair), Deployment(many, pair, {}))
    assert split.simulated is not None
    assert split.level("tpot_p95_ms") < 0.8 * both["tpot_p95_ms"]
    level = {"slo": {"tpot_p95_ms": 1.1 * split.level("tpot_p95_ms")}}
    workload = {"first_turn_tokens": 8000}
    found_level = decisions_for(**two, **level, workload=workload)["service_levels"]
    assert found_level.value == "met"
    assert "of the turns of the simulated load" in found_level.reason


def test_the_commands_say_what_users_see(tmp_path: Any) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps(spec_for().model_dump(exclude_none=True)))

    def said(*arguments: str) -> Any:
        done = CliRunner().invoke(main, [*arguments, "--json"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    found = said("predict", str(path))
    assert found["load"]["ttft_p99_ms"] >= found["load"]["ttft_p50_ms"] > 0
    assert said("predict", str(path), "--set", "workload.concurrency=1")["load"] is None
    level = f"slo.tpot_p95_ms={2 * found['load']['tpot_p95_ms']}"
    (entry,) = said("sweep", str(path), "--gpus", "H200", "--count", "1", "--set", level)
    assert entry["capacity"]["users"] >= 8
    assert entry["capacity"]["machines"] == 1
    assert entry["slo_missed"] is None
