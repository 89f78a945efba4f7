"""What a plan says of its service levels and of itself: every number is that of its programs."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
from specs import merged

from tokenspeed_plan.planner.advisor.candidate import Candidate, Knobs
from tokenspeed_plan.planner.advisor.numbers import most_within
from tokenspeed_plan.planner.advisor.prediction import Predictor
from tokenspeed_plan.planner.advisor.resolve import Decided, resolve
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.ledger import Ledger
from tokenspeed_plan.planner.machines.hardware import find_hardware
from tokenspeed_plan.planner.models.config import load_preset
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.schema import Decision

pytestmark = pytest.mark.slow  # whole processes, or many examples

LONG_PROMPTS = {"first_turn_tokens": 20_000, "output_tokens": 200, "concurrency": 8}


def spec_for(model: str = "0.8b", count: int = 1, **changes: Any) -> Spec:
    data = {
        "version": 1,
        "model": {"preset": f"qwen3.5-{model}"},
        "target": {"gpu": "H200", "count": count},
        "workload": LONG_PROMPTS,
    }
    return Spec.model_validate(merged(data, changes))


@cache
def _decided(text: str) -> tuple[Decided, dict[str, Decision]]:
    spec, ledger = Spec.model_validate_json(text), Ledger()
    config, _ = load_preset(str(spec.model.preset))
    decided = resolve(spec, config, find_hardware(spec.target.gpu), ledger)
    return decided, {decision.name: decision for decision in ledger.decisions}


def decided_for(*args: Any, **changes: Any) -> tuple[Decided, dict[str, Decision]]:
    return _decided(spec_for(*args, **changes).model_dump_json(exclude_none=True))


def test_a_level_that_is_met_changes_nothing() -> None:
    free, _ = decided_for()
    tpot_ms = free.predicted.values["tpot_ms"]
    met, decisions = decided_for(slo={"tpot_ms": tpot_ms * 1.01})
    assert met.interleaving.tokens is None and "without a limit" in met.interleaving.reason
    assert met.predicted.values == free.predicted.values
    assert decisions["service_levels"].value == "met"


def test_a_step_may_take_the_time_of_all_its_tokens() -> None:
    """A step with drafts takes longer than a token may, and still nothing is limited."""
    free, _ = decided_for(workload={"concurrency": 2}, speculation={"depth": 4})
    step_ms = sum(free.predicted.decode_step_us.values()) / 1e3
    tpot_ms = free.predicted.values["tpot_ms"]
    assert tpot_ms < step_ms
    slo = {"tpot_ms": (tpot_ms + step_ms) / 2}
    met, _ = decided_for(workload={"concurrency": 2}, speculation={"depth": 4}, slo=slo)
    assert met.interleaving.tokens is None and met.predicted.slo_missed is None


def test_a_limit_is_priced() -> None:
    """Less of a prompt between two decode steps: sooner tokens, and later first tokens."""
    free, _ = decided_for()
    level = free.predicted.values["tpot_ms"] * 0.7
    limited, _ = decided_for(slo={"tpot_ms": level})
    tokens = limited.interleaving.tokens
    assert tokens is not None and tokens < limited.knobs.prefill_chunk
    assert limited.predicted.slo_missed is None
    assert limited.predicted.values["tpot_ms"] <= level
    assert limited.predicted.values["ttft_ms"] > free.predicted.values["ttft_ms"]
    assert limited.predicted.values["tokens_per_s_gpu"] < free.predicted.values["tokens_per_s_gpu"]


def test_a_limit_that_does_not_help_is_not_set_and_a_page_is_a_warning() -> None:
    free, _ = decided_for()
    out_of_reach, decisions = decided_for(slo={"tpot_ms": 0.01})
    assert out_of_reach.interleaving.tokens is None
    assert "would not meet" in out_of_reach.interleaving.reason
    assert out_of_reach.predicted.values == free.predicted.values
    assert decisions["service_levels"].value == "missed"
    agents = {"kind": "agentic"}
    page, _ = decided_for(slo={"tpot_ms": 1.4}, workload=agents)
    assert page.interleaving.tokens == page.knobs.page_size
    assert "warning: one page" in page.interleaving.reason
    ttft_ms = decided_for(workload=agents)[0].predicted.values["ttft_ms"]
    both, _ = decided_for(slo={"tpot_ms": 1.4, "ttft_ms": 1.1 * ttft_ms}, workload=agents)
    assert both.interleaving.tokens is None, "first tokens would miss theirs by more"
    alone, _ = decided_for(slo={"tpot_ms": 0.01}, workload={"concurrency": 1})
    assert alone.interleaving.tokens is None


@pytest.mark.parametrize(
    ("limit", "found"), [(5, 5), (64, 64), (63.5, 63), (500, 100), (0, 4), (4, 4)]
)
def test_the_most_within_a_limit(limit: float, found: int) -> None:
    assert most_within(limit, float, 4, 100) == found


def test_the_prediction_is_that_of_the_programs_written() -> None:
    """Also where a level is out of reach: the drafts are those of the buckets."""
    for changes in ({}, {"slo": {"ttft_ms": 0.01}}):
        decided, decisions = decided_for("9b", **changes)
        assert max(decided.depths.values()) > 0
        spec = spec_for("9b", **changes)
        config, hardware = load_preset("qwen3.5-9b")[0], find_hardware("H200")
        predictor = Predictor(spec, config, hardware, rollback=decided.rollback)
        users = 8
        step = predictor.steps.decode(
            decided.layout,
            round(decided.predicted.decode_batch),
            20_100,
            decided.depths[min(b for b in decided.depths if b >= decided.predicted.decode_batch)],
        )
        assert sum(decided.predicted.decode_step_us.values()) == pytest.approx(
            step.total_us, rel=1e-3
        )
        assert max(decided.depths) == users
        taken_ms = decided.predicted.values["turn_time_ms"]
        for name in ("parallelism", "prefill_chunk", "advice"):
            number = re.search(r"turn_time_ms ([\d.]+)", decisions[name].reason)
            assert number and float(number[1]) == pytest.approx(taken_ms, rel=5e-4), name


def test_each_batch_has_the_drafts_of_its_bucket() -> None:
    """Eight users decode in the largest bucket, which drafts nothing; a lone one drafts three."""
    spec = spec_for(workload={"first_turn_tokens": 100})
    predictor = Predictor(spec, load_preset("qwen3.5-0.8b")[0], find_hardware("H200"))
    layout = ParallelLayout(1, 1, 1)
    candidate = Candidate(layout, Knobs(128, 64, depth=3))
    made = predictor.predict(candidate, {1: 3, 2: 3, 4: 3, 8: 0})
    batch = round(made.turn.batch)
    assert batch > 4
    assert made.step == predictor.steps.decode(layout, batch, 200, 0)
    assert made.token_us == pytest.approx(made.step.total_us, rel=0.02)
    drafting = predictor.predict(candidate)
    assert drafting.step == predictor.steps.decode(layout, round(drafting.turn.batch), 200, 3)


def test_runners_up_have_the_drafts_of_the_winner() -> None:
    decided, decisions = decided_for("9b")
    chunk = decisions["prefill_chunk"]
    assert chunk.options and decided.knobs.depth
    for option in chunk.options:
        assert f"{decided.knobs.depth} drafts" in option.what
        assert option.numbers["turn_time_ms"] >= decided.predicted.values["turn_time_ms"]


def test_a_plan_says_what_it_does_not_keep() -> None:
    workload = {"first_turn_tokens": 8000, "turn_tokens": 100, "turns": 4}
    free, decisions = decided_for(workload=workload)
    assert "service_levels" not in decisions
    mean_ms = free.predicted.values["ttft_ms"]
    first_ms = free.predicted.values["first_turn_ttft_ms"]
    level = (mean_ms + first_ms) / 2
    assert mean_ms < level < first_ms
    _, decisions = decided_for(workload=workload, slo={"ttft_ms": level})
    assert decisions["service_levels"].value == "met"
    assert f"a first turn, one of 4, takes {first_ms:.4g}, which is over it" in (
        decisions["service_levels"].reason
    )
    _, decisions = decided_for(workload={"arrivals_per_s": 1000.0})
    assert decisions["service_levels"].value == "overloaded"
    assert "more than it can answer" in decisions["service_levels"].reason


def test_reasons_say_the_rule_of_drafts() -> None:
    _, decisions = decided_for("9b")
    assert "fewest within 5% of the least time a token" in decisions["speculation"].reason


def test_advice_for_fewer_gpus_says_so_and_a_split_is_compared_with_this_plan() -> None:
    """A token of a small model costs less on a few GPUs than on eight."""
    decided, decisions = decided_for("9b", 8, objective={"minimize": "cost_per_token"})
    advice = decisions["advice"]
    assert advice.value != "this plan" and re.search("uses [1-4] of 8 GPUs", advice.reason)
    cost = decided.predicted.values["cost_per_million_tokens_usd"]
    for name, pattern in (
        ("advice", r"this plan ([\d.]+)"),
        ("disaggregation", r"([\d.]+) in this"),
    ):
        said = re.search(pattern, decisions[name].reason)
        assert said and float(said[1]) == pytest.approx(cost, rel=1e-3), name


@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (1, 2)])
def test_two_pools_that_are_stated_are_planned(prefill: int, decode: int) -> None:
    stated = {"prefill": prefill, "decode": decode}
    decided, decisions = decided_for(count=prefill + decode, disaggregation=stated)
    assert decided.prefill is not None
    assert (decided.prefill.num_ranks, decided.layout.num_ranks) == (prefill, decode)
    found = decisions["disaggregation"]
    assert (
        found.value == f"{prefill} prefill, {decode} decode"
        and "MB a turn by nvlink" in found.reason
    )
    assert found.runner_up is None  # nothing else was asked for


def test_auto_splits_where_that_pays_and_says_do_not_elsewhere() -> None:
    """Long prompts hold up the tokens of others; a lone agent wants both GPUs at once."""
    prompts = {
        "kind": "agentic",
        "concurrency": 8,
        "turns": 1,
        "first_turn_tokens": 50_000,
        "output_tokens": 1000,
    }
    tpot = {"minimize": "tpot"}
    split, decisions = decided_for(
        "35b-a3b", 2, workload=prompts, objective=tpot, speculation="off"
    )
    assert split.prefill is not None and decisions["parallelism"].value.startswith("prefill")
    runner_up = decisions["disaggregation"].runner_up
    assert runner_up is not None and runner_up.startswith("one pool, ")
    beaten = float(runner_up.rpartition(" ")[2])
    assert split.predicted.values["tpot_ms"] < beaten
    alone = {"kind": "agentic", "concurrency": 1, "turns": 12}
    whole, decisions = decided_for(
        "35b-a3b", 2, workload=alone, objective={"minimize": "turn_time"}, speculation="off"
    )
    assert whole.prefill is None and decisions["disaggregation"].value == "off"
    assert "do not split: turn_time_ms" in decisions["disaggregation"].reason


def test_pools_that_no_plan_holds_are_refused() -> None:
    with pytest.raises(SpecError, match="pools hand over checkpoints"):
        decided_for(
            count=2,
            disaggregation={"prefill": 1, "decode": 1},
            serving={"checkpoint_tokens": 0},
        )
    with pytest.raises(SpecError, match=r"2 \+ 2 = 4 GPUs, the target has 2"):
        decided_for(count=2, disaggregation={"prefill": 2, "decode": 2})
