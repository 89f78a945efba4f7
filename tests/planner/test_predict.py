"""What `predict` refuses: it answers the question that was asked, or none."""

from __future__ import annotations

from typing import Any

import pytest
from specs import merged

from tokenspeed_plan.planner.advisor.legality import check_stated
from tokenspeed_plan.planner.advisor.ranking import SearchResult
from tokenspeed_plan.planner.advisor.search_space import MAX_POOL_GPUS
from tokenspeed_plan.planner.commands.predict import search
from tokenspeed_plan.planner.models.config import load_preset
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.errors import SpecError

WORKLOAD = {"first_turn_tokens": 1024, "output_tokens": 256, "concurrency": 1}


def spec_for(model: str = "qwen3.5-9b", count: int = 1, **changes: Any) -> Spec:
    data = {
        "version": 1,
        "model": {"preset": model},
        "target": {"gpu": "H200", "count": count},
        "workload": WORKLOAD,
        "speculation": "off",
    }
    return Spec.model_validate(merged(data, changes))


def find(*args: Any, **changes: Any) -> SearchResult:
    spec = spec_for(*args, **changes)
    return search(spec, load_preset(str(spec.model.preset))[0])[1]


@pytest.mark.parametrize(
    ("model", "count", "parallelism"),
    [
        ("qwen3.5-9b", 8, {"attention": {"tp": 3}}),
        ("qwen3.5-9b", 4, {"attention": {"tp": 8}}),
        ("qwen3.5-9b", 32, {"attention": {"tp": 32}}),
        ("qwen3.5-35b-a3b", 8, {"moe": {"ep": 3}}),
        ("qwen3.5-35b-a3b", 4, {"moe": {"tp": 4, "ep": 2}}),
        ("qwen3.5-35b-a3b", 4, {"attention": {"tp": 2, "dp": 4}}),
        ("qwen3.5-9b", 2, {"attention": {"tp": 2, "context_split": 2}}),
    ],
)
def test_layouts_that_do_not_divide(model: str, count: int, parallelism: Any) -> None:
    with pytest.raises(SpecError) as refused:
        find(model, count, parallelism=parallelism)
    assert refused.value.hint


@pytest.mark.parametrize("disaggregation", ["auto", "off"])
def test_a_stated_layout_is_the_one_that_is_priced(disaggregation: str) -> None:
    asked = {"attention": {"tp": 2}}
    result = find(count=4, parallelism=asked, disaggregation=disaggregation)
    for prediction in result.predictions:
        pools = [prediction.candidate.layout, prediction.candidate.prefill]
        assert {pool.attention_tp for pool in pools if pool} == {2}


@pytest.mark.parametrize(
    ("count", "prefill", "decode"), [(1, 1, 3), (4, 1, 3), (4, 3, 2), (8, 1, 3), (1, 1, 1)]
)
def test_pools_are_those_that_are_stated(count: int, prefill: int, decode: int) -> None:
    """Nothing else is priced in their place: three GPUs cannot share 16 heads."""
    with pytest.raises(SpecError):
        find(count=count, disaggregation={"prefill": prefill, "decode": decode})


def test_stated_pools_are_priced() -> None:
    best = find(count=2, disaggregation={"prefill": 1, "decode": 1}).best.candidate
    assert best.prefill and best.prefill.num_ranks == best.layout.num_ranks == 1


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"workload": {"first_turn_tokens": 262_000}}, "has 262144 positions"),
        ({"model": "qwen3-8b", "serving": {"checkpoint_tokens": 0}}, "no recurrent"),
        ({"model": "qwen3-8b", "serving": {"state": "bf16"}}, "no recurrent"),
        ({"model": "qwen3-8b", "speculation": {"depth": 2}}, "has no MTP layer"),
        ({"speculation": {"draft_vocab": 300_000}}, "tokens"),
    ],
)
def test_plan_and_predict_refuse_alike(changes: Any, match: str) -> None:
    spec = spec_for(**changes)
    config, _ = load_preset(str(spec.model.preset))
    for door in (lambda: search(spec, config), lambda: check_stated(spec, config)):
        with pytest.raises(SpecError, match=match):
            door()


def test_one_token_comes_from_the_prompt_alone() -> None:
    """The first token needs no decode step: one more token costs one step more, as counted."""
    one, two, three = (
        find(workload={"output_tokens": tokens}).best.metrics for tokens in (1, 2, 3)
    )
    assert one["turn_time_ms"] == one["ttft_ms"] > 0
    step_ms = two["turn_time_ms"] - two["ttft_ms"]
    assert two["tpot_ms"] == pytest.approx(step_ms) == pytest.approx(one["tpot_ms"], rel=0.01)
    assert three["turn_time_ms"] - three["ttft_ms"] == pytest.approx(2 * step_ms, rel=0.01)


def test_many_gpus_are_searched_in_bounds() -> None:
    """As many deployments of 1,024 GPUs are looked at as of 64, and no pool is larger."""
    few, many = find(count=64), find(count=1024)
    assert len(many.predictions) == len(few.predictions) < 1000
    assert max(each.candidate.layout.num_ranks for each in many.predictions) <= MAX_POOL_GPUS
    assert many.best.as_json() == few.best.as_json()
