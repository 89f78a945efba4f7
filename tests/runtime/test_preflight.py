"""What the runtime refuses before it starts, and how it judges a difference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.compare import difference
from tokenspeed_plan.runtime.loading import preflight as checks

NAN, INF = float("nan"), float("inf")


@pytest.mark.slow
@pytest.mark.parametrize(("count", "streams", "fits"), [(1, 1, True), (2, 1, True), (1, 2, False)])
def test_several_streams_are_not_replayed_yet(
    count: int, streams: int, fits: bool, tiny_plan: Plan, monkeypatch: Any
) -> None:
    monkeypatch.setattr(checks, "compute_capability", lambda: 90)
    target = tiny_plan.target.model_copy(update={"sm": 90, "count": count})
    programs = tuple(
        program.model_copy(update={"num_streams": streams}) for program in tiny_plan.pool.programs
    )
    plan = tiny_plan.with_pool(programs=programs).model_copy(update={"target": target})
    if fits:
        checks.check_target(plan)
        return
    with pytest.raises(PlanError, match=f"the plan has {streams} streams"):
        checks.check_target(plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("got", "wanted"),
    [(0.0, NAN), (NAN, 0.0), (NAN, 1.0), (INF, -INF), (3e38, INF), (INF, NAN), (0.0, INF)],
)
def test_what_is_not_finite_must_be_the_same(got: float, wanted: float, dtype: torch.dtype) -> None:
    one, other = torch.tensor([1.0, got], dtype=dtype), torch.tensor([1.0, wanted], dtype=dtype)
    assert difference(one, other) != difference(one, other)
    assert difference(other, other) == 0.0
