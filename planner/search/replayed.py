"""What a frozen plan's programs should take on a given batch: the prices of the search, for `tokenspeed bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenspeed_plan.planner.compile import find_model
from tokenspeed_plan.planner.hardware import find_hardware
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.search.predict import digits
from tokenspeed_plan.planner.search.steps import StepModel
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.schema import Plan


def step_prediction(plan: Plan, bundle: Path, phase: str, tokens: int, seqs: int, context: int) -> dict[str, Any]:
    """Microseconds, their interval and their kinds, of one replay.

    Raises:
        SpecError: the plan's model is not where its spec says.
    """
    spec = Spec.model_validate(plan.spec)
    hardware = find_hardware(spec.target.gpu)
    steps = StepModel(find_model(spec, bundle).config, hardware, spec.model.weights, spec.workload.skew)
    layout = ParallelLayout(plan.layout.attention.tp, plan.layout.moe.tp, plan.layout.moe.ep)
    if phase == "decode":
        step = steps.decode(layout, seqs, context)
    else:
        step = steps.prefill(layout, tokens, max(context - tokens, 0))
    error_us = step.error_us(hardware.errors)
    return {
        "predicted_us": digits(step.total_us),
        "predicted_interval_us": [digits(step.total_us - error_us), digits(step.total_us + error_us)],
        "predicted_kinds_us": {kind: digits(getattr(step, kind)) for kind in hardware.errors},
    }
