"""What the planner leaves for the prefix cache, and prefill between two decode steps."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import make_spec

from tokenspeed_plan.planner import compile_plan, find_model
from tokenspeed_plan.planner.passes.limits import interleaved_tokens, prefill_buckets
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.plans.types import Phase

PREDICTED_US: dict[tuple[Phase, int], float] = {
    ("decode", 1): 500.0,
    ("decode", 4): 1000.0,
    ("prefill", 128): 2000.0,
    ("prefill", 512): 6000.0,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tpot_ms", "tokens"),
    [(None, 512), (7.0, 512), (100.0, 512), (5.0, 320), (3.0, 128), (2.0, 16), (0.1, 16)],
)
def test_prefill_between_decode_steps_keeps_the_time_per_token(
    tpot_ms: float | None, tokens: int, tiny_plan: Plan
) -> None:
    """1 ms is the decode step's, the rest the prompt's: 128 tokens in 2 ms, 512 in 6; or a page."""
    assert tiny_plan.pool.limits.max_tokens == 512
    assert interleaved_tokens(tiny_plan.pool.limits, tpot_ms, PREDICTED_US) == tokens


@pytest.mark.slow
@pytest.mark.parametrize("where", ["slo", "objective"])
def test_the_spec_sets_the_time_per_token(where: str, checkpoint: Any) -> None:
    slo = {"tpot_ms": 3.0}
    spec = make_spec(checkpoint("moe"), **{where: slo if where == "slo" else {"slo": slo}})
    plan = compile_plan(spec, find_model(spec))
    assert plan.pool.limits.interleaved_tokens < plan.pool.limits.max_tokens
    decisions = {decision.name: decision for decision in plan.decisions}
    assert "within 3.0 ms" in decisions["interleaving"].reason


def test_checkpoints_are_in_the_memory_map(checkpoint: Any) -> None:
    spec = make_spec(checkpoint("moe"), workload={"first_turn_tokens": 1500, "concurrency": 3})
    plan = compile_plan(spec, find_model(spec))
    limits = plan.pool.limits
    assert (limits.checkpoint_interval, limits.num_checkpoints) == (512, 3 * (2 + 1568 // 512))
    assert limits.num_state_slots == 2 + 3 * 2 + limits.num_checkpoints
    rows = {buffer.tensor.shape[0] for buffer in plan.pool.buffers if buffer.arena == "state"}
    assert rows == {limits.num_state_slots}


@pytest.mark.parametrize(
    ("turn_tokens", "buckets"),
    [(0, (128, 512)), (100, (128, 256, 512)), (256, (128, 512)), (800, (128, 512))],
)
def test_a_turn_has_a_program_of_its_size(
    turn_tokens: int, buckets: tuple[int, ...], tiny_plan: Plan
) -> None:
    """With the last token of the answer before it: 257 of 256."""
    assert prefill_buckets(tiny_plan.pool.limits, turn_tokens) == buckets
