"""A frozen plan's programs by the prices of the search: on a given batch, and under the machine's roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenspeed_plan.codegen.page.plan_page import Roof, RoofPoint
from tokenspeed_plan.planner.advisor.hardware import find_hardware
from tokenspeed_plan.planner.advisor.prediction import digits
from tokenspeed_plan.planner.advisor.step_model import StepModel
from tokenspeed_plan.planner.compile import find_model
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.passes.cost import Load, op_cost, op_time
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.plans.types import Phase


def step_prediction(
    plan: Plan, bundle: Path, phase: str, tokens: int, seqs: int, context: int, depth: int = 0
) -> dict[str, Any]:
    """Microseconds, their interval and their kinds, of one replay.

    Raises:
        SpecError: the plan's model is not where its spec says.
    """
    steps, layout = _model_of(plan, bundle)
    hardware = steps.hardware
    if phase == "decode":
        step = steps.decode(layout, seqs, context, depth)
    else:
        step = steps.prefill(layout, tokens, max(context - tokens, 0), depth=depth)
    error_us = step.error_us(hardware.errors)
    return {
        "predicted_us": digits(step.total_us),
        "predicted_interval_us": [
            digits(step.total_us - error_us),
            digits(step.total_us + error_us),
        ],
        "predicted_kinds_us": {kind: digits(getattr(step, kind)) for kind in hardware.errors},
    }


def _model_of(plan: Plan, bundle: Path) -> tuple[StepModel, ParallelLayout]:
    spec = Spec.model_validate(plan.spec)
    hardware = find_hardware(spec.target.gpu)
    steps = StepModel(
        find_model(spec, bundle).config,
        hardware,
        spec.model.weights,
        spec.workload.skew,
        recomputes=bool(plan.pool.limits.kept_inputs),
        draft_vocab=spec.draft_vocab,
    )
    return steps, ParallelLayout(
        plan.pool.layout.attention.tp, plan.pool.layout.moe.tp, plan.pool.layout.moe.ep
    )


def roofline(plan: Plan, bundle: Path) -> Roof:
    """Kernels of a lone user's step and of the largest chunk, by kind, under the data sheet's limits.

    Raises:
        SpecError: the plan's model is not where its spec says.
    """
    steps, layout = _model_of(plan, bundle)
    middle, chunk = plan.pool.limits.max_seq_len // 2, plan.pool.limits.max_tokens
    points = [
        *_points(steps, layout, "decode", Load(1, 1, middle)),
        *_points(steps, layout, "prefill", Load(chunk, 1, min(middle, chunk))),
    ]
    rates = steps.hardware.matrix_flops_per_s
    return Roof(
        steps.hardware.peak_bytes_per_s, rates.get(steps.dtype, rates["bf16"]), tuple(points)
    )


def _points(steps: StepModel, layout: ParallelLayout, phase: Phase, load: Load) -> list[RoofPoint]:
    graph = steps.graph(layout, phase, load.num_tokens)
    sums: dict[str, list[float]] = {}
    for op in graph.ops:
        cost, time = op_cost(graph, op, load), op_time(graph, op, load, steps.hardware)
        row = sums.setdefault(op.kind, [0.0, 0.0, 0.0])
        for index, value in enumerate((cost.flops, cost.moved_bytes, time.total_us)):
            row[index] += steps.count_of(op.name) * value
    total_us = sum(us for _, _, us in sums.values())
    return [
        RoofPoint(kind, phase, flops / moved, flops / us * 1e6, us / total_us)
        for kind, (flops, moved, us) in sums.items()
        if flops and moved
    ]
