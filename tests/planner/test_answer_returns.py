"""Answers go back to the pool for prompts where the link takes less time than computing them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from conftest import ROOT, make_spec

from tokenspeed_plan.planner import compile_plan, find_model
from tokenspeed_plan.planner.advisor import transfer
from tokenspeed_plan.planner.advisor.answer_returns import ReturnPrices
from tokenspeed_plan.planner.advisor.prediction import Prediction
from tokenspeed_plan.planner.commands.predict import search
from tokenspeed_plan.plans.errors import PlanError, SpecError
from tokenspeed_plan.plans.schema import Decision, Plan
from tokenspeed_plan.plans.validate import validate
from tokenspeed_plan.plans.validate.return_rules import check_answer_returns

TALK = {"kind": "agentic", "turns": 4, "turn_tokens": 40, "output_tokens": 64, "concurrency": 2}
# 35B-A3B between two H200: pages of 64 tokens, measured rates.
NVLINK = ReturnPrices(64, 1_310_720, 63_000_000, "nvlink", 35e9, 14.0)


@cache
def planned(answers: str = "auto", **workload: Any) -> Plan:
    pair = {"prefill": 1, "decode": 1, "answers": answers}
    model = ROOT / "examples" / "demo" / "model"
    spec = make_spec(model, target={"count": 2}, disaggregation=pair, workload=TALK | workload)
    return compile_plan(spec, find_model(spec))


def decision(plan: Plan) -> Decision:
    (found,) = [each for each in plan.decisions if each.name == "answer_returns"]
    return found


def test_it_pays_from_where_the_lines_cross() -> None:
    """By hand: (15 + 63e6 / 35e9 s) / (14 us - 20,480 B / 35e9 B/s) is 135.2 tokens, 3 pages."""
    least = NVLINK.least_tokens
    assert least == 192
    assert NVLINK.pushed_us(least) < least * NVLINK.token_us
    assert NVLINK.pushed_us(least - 64) > (least - 64) * NVLINK.token_us
    assert replace(NVLINK, transport="tcp", bytes_per_s=0.5e9).least_tokens is None


def test_what_is_stated_is_planned() -> None:
    plan = planned("return")
    returns, limits = plan.pools[1].answer_returns, plan.pools[1].limits
    assert returns is not None and plan.pools[0].answer_returns is None
    assert returns.slots == limits.max_seqs == 2
    assert "as the spec says" in decision(plan).reason and "by tcp" in decision(plan).reason
    assert planned("stay").pools[1].answer_returns is None


def test_auto_says_what_both_ways_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """By TCP it pays for a small model on a CPU; not by a slow link, or without a next turn."""
    plan = planned()
    assert plan.pools[1].answer_returns is not None
    assert "computing them takes" in decision(plan).reason
    once = planned(turns=1, turn_tokens=0)
    assert once.pools[1].answer_returns is None
    assert decision(once).reason == "no turn comes after an answer"
    monkeypatch.setattr(transfer, "TCP_BYTES_PER_S", 1e6)
    slow = planned.__wrapped__()
    assert slow.pools[1].answer_returns is None and decision(slow).value == "off"
    assert "computing them takes" in decision(slow).reason


def prediction(answers: str, **workload: Any) -> Prediction:
    pair = {"prefill": 1, "decode": 1, "answers": answers}
    model = ROOT / "examples" / "demo" / "model"
    spec = make_spec(model, target={"count": 2}, disaggregation=pair, workload=TALK | workload)
    _, result = search(spec, find_model(spec).config)
    return result.best


def test_what_stays_is_computed_again() -> None:
    """Of an average turn of four by hand: 64 of an answer and 40 new, or those 40 alone."""
    back, stay = prediction("return"), prediction("stay")
    first = back.prompt_tokens - 0.75 * (40 * 2 + 128)  # of the first turn
    later = first + 2 * 40 + 128
    mean = (first + 3 * later) / 4
    assert back.hit_rate == pytest.approx(0.75 * (later - 40) / mean)
    assert stay.hit_rate == pytest.approx(0.75 * (later - 40 - 64) / mean)
    assert stay.first_turn_ttft_us == pytest.approx(back.first_turn_ttft_us, rel=0.05)
    assert stay.prompt.total_us > back.prompt.total_us
    assert stay.metrics["ttft_ms"] > back.metrics["ttft_ms"]
    assert back.transfer and stay.transfer
    assert stay.transfer.size_bytes == back.transfer.size_bytes, "the other pool has the answer"
    once = {"turns": 1, "turn_tokens": 0}
    assert prediction("stay", **once).metrics == prediction("return", **once).metrics


def test_auto_is_priced_as_it_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prediction("auto").metrics == prediction("return").metrics
    monkeypatch.setattr(transfer, "TCP_BYTES_PER_S", 1e6)
    assert prediction("auto").metrics == prediction("stay").metrics
    assert planned.__wrapped__().pools[1].answer_returns is None


def test_hand_overs_keep_their_state_slots() -> None:
    """Rows of a batch have few checkpoints; prompts come before answers."""
    rows = {"kind": "batch", "turns": 1, "turn_tokens": 0, "concurrency": 24}
    with pytest.raises(SpecError, match="no state slot to go back to: 19 checkpoints"):
        planned("return", **rows)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"slots": 3}, "3 answers go back at once, of 2 sequences"),
        ({"least_tokens": 3}, "less than a page"),
    ],
)
def test_a_plan_whose_answers_cannot_go_back(changes: dict[str, int], says: str) -> None:
    decode, prefill = planned("return").pools
    plan = planned("return")
    returns = prefill.answer_returns
    assert returns is not None
    wrong = prefill.model_copy(update={"answer_returns": returns.model_copy(update=changes)})
    with pytest.raises(PlanError, match=says):
        validate(plan.model_copy(update={"pools": (decode, wrong)}))
    there = decode.model_copy(update={"answer_returns": returns})
    with pytest.raises(PlanError, match="go back to a pool of role `decode`"):
        validate(plan.model_copy(update={"pools": (there, prefill)}))


def test_answers_leave_hand_overs_their_slots() -> None:
    plan = planned("return")
    prefill = plan.pools[1]
    few = prefill.limits.model_copy(update={"num_checkpoints": 3})
    with pytest.raises(PlanError, match="prompts leave 1 of the 3 checkpoints"):
        check_answer_returns(plan, prefill.model_copy(update={"limits": few}))
