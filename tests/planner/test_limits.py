"""What the planner leaves for the prefix cache, and prefill between two decode steps."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import make_spec

from tokenspeed_plan.planner import compile_plan, find_model
from tokenspeed_plan.planner.advisor.resolve import resolve
from tokenspeed_plan.planner.ledger import Ledger
from tokenspeed_plan.planner.machines.hardware import find_hardware
from tokenspeed_plan.planner.passes.limits import plan_limits, prefill_buckets
from tokenspeed_plan.plans.schema import Capacity, Plan


@pytest.mark.slow
@pytest.mark.parametrize("where", ["slo", "objective"])
def test_the_limit_of_prefill_is_in_the_plan(where: str, checkpoint: Any) -> None:
    """Eight users with long prompts and short answers, whose tokens may take a little less time."""
    workload = {"first_turn_tokens": 3000, "output_tokens": 16}
    free = make_spec(checkpoint("moe"), workload=workload)
    model = find_model(free)
    decided = resolve(free, model.config, find_hardware("cpu"), Ledger())
    slo = {"tpot_ms": 0.8 * decided.predicted.values["tpot_ms"]}
    changes = {"slo": slo}
    if where == "objective":
        changes = {"objective": {"slo": slo}}
    plan = compile_plan(make_spec(checkpoint("moe"), workload=workload, **changes), model)
    limits = plan.pool.limits
    assert limits.page_size <= limits.interleaved_tokens < limits.max_tokens
    decisions = {decision.name: decision for decision in plan.decisions}
    assert f"a token within {slo['tpot_ms']:g} ms" in decisions["interleaving"].reason
    assert decisions["interleaving"].value.startswith(f"{limits.interleaved_tokens} prefill tokens")


@pytest.mark.parametrize(("asked", "planned"), [(None, 512), (64, 64), (512, 512), (4096, 512)])
def test_no_limit_is_a_chunk(asked: int | None, planned: int, tiny_plan: Plan) -> None:
    fields = tiny_plan.pool.limits.model_dump(exclude={"interleaved_tokens"})
    assert plan_limits(Capacity(**fields), asked).interleaved_tokens == planned


def test_checkpoints_are_in_the_memory_map(checkpoint: Any) -> None:
    spec = make_spec(checkpoint("moe"), workload={"first_turn_tokens": 1500, "concurrency": 3})
    plan = compile_plan(spec, find_model(spec))
    limits = plan.pool.limits
    assert (limits.checkpoint_interval, limits.num_checkpoints) == (512, 3 * (2 + 1568 // 512))
    assert limits.num_state_slots == 2 + 3 * 1 + limits.num_checkpoints
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
