"""Plans and answers with speculation, for several test modules."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import make_spec
from conversations import Conversation, converse
from planning import planned

from tokenspeed_plan.planner import compile_plan, find_model
from tokenspeed_plan.planner.passes import limits
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime import Engine, SamplingParams

PROMPTS = ([3, 4, 5], list(range(70)), [50] * 37, [7, 300, 20, 11], list(range(40, 110)))


@cache
def plan_of(folder: Path, depth: int, rollback: str = "snapshot", **changes: Any) -> Plan:
    spec = make_spec(
        folder, speculation={"depth": depth, "rollback": rollback} if depth else "off", **changes
    )
    plan = planned(spec)
    assert bool(plan.pool.limits.kept_inputs) == (depth > 0 and rollback == "recompute")
    return plan


@cache
def plan_with_two_slots(folder: Path, **changes: Any) -> Plan:
    """Without drafts, and yet no step writes the state slot that it reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "SLOTS_IN_PLACE", 2)
        spec = make_spec(folder, **changes)
        plan = compile_plan(spec, find_model(spec))
    assert not plan.pool.limits.in_place
    return plan


@cache
def conversations_of(folder: Path, count: int, seed: int) -> list[Conversation]:
    """Of a plan without drafts."""
    return converse(plan_of(folder, 0), folder, count, seed)


def tokens_of(
    engine: Engine, prompts: Any = PROMPTS, most: int = 24, **params: Any
) -> list[tuple[int, ...]]:
    done = engine.generate(
        prompts, SamplingParams(max_tokens=most, **{"ignore_eos": True} | params)
    )
    return [item.token_ids for item in done]
