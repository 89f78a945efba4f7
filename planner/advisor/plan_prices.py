"""What the programs of a frozen plan cost by the advisor: for a batch, and as a roofline."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenspeed_plan.codegen.page.plan_page import Roof, RoofPoint
from tokenspeed_plan.planner.advisor.numbers import digits
from tokenspeed_plan.planner.advisor.step_model import StepModel
from tokenspeed_plan.planner.compile import find_model
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.machines.hardware import find_hardware
from tokenspeed_plan.planner.passes.cost import Load, op_cost, op_time
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.plans.types import Phase


def step_prediction(
    plan: Plan, bundle: Path, phase: str, tokens: int, seqs: int, context: int, depth: int = 0
) -> dict[str, Any]:
    """The predicted microseconds of one step, with their interval and their kinds.

    Args:
        plan: the frozen plan.
        bundle: its folder, near which the model is looked up.
        phase: `decode` or `prefill`.
        tokens: of the chunk, for prefill.
        seqs: sequences of the batch, for decode.
        context: tokens of each sequence, those of the chunk included.
        depth: drafts of each sequence.

    Raises:
        SpecError: the plan's model is not where its spec says.
    """
    steps, layout = _step_model(plan, bundle)
    hardware = steps.hardware
    if phase == "decode":
        step = steps.decode(layout, seqs, context, depth)
    else:
        step = steps.prefill(layout, tokens, max(context - tokens, 0), depth=depth)
    error_us = step.error_us(hardware.errors)
    interval = (step.total_us - error_us, step.total_us + error_us)
    return {
        "predicted_us": digits(step.total_us),
        "predicted_interval_us": [digits(end) for end in interval],
        "predicted_kinds_us": {kind: digits(getattr(step, kind)) for kind in hardware.errors},
    }


def _step_model(plan: Plan, bundle: Path) -> tuple[StepModel, ParallelLayout]:
    spec = Spec.model_validate(plan.spec)
    steps = StepModel(
        find_model(spec, bundle).config,
        find_hardware(spec.target.gpu),
        weights=spec.model.weights,
        skew=spec.workload.skew,
        rollback=plan.pool.limits.rollback,
        draft_vocab=spec.draft_vocab,
    )
    layout = plan.pool.layout
    return steps, ParallelLayout(layout.attention.tp, layout.moe.tp, layout.moe.ep)


def roofline(plan: Plan, bundle: Path) -> Roof:
    """Kernels of a decode step at batch 1 and of the largest chunk, by kind, under the peak rates.

    Raises:
        SpecError: the plan's model is not where its spec says.
    """
    steps, layout = _step_model(plan, bundle)
    limits, hardware = plan.pool.limits, steps.hardware
    middle, chunk = limits.max_seq_len // 2, limits.max_tokens
    points = [
        *_points(steps, layout, "decode", Load(1, 1, middle)),
        *_points(steps, layout, "prefill", Load(chunk, 1, min(middle, chunk))),
    ]
    rates = hardware.matrix_flops_per_s
    flops_per_s = rates.get(steps.dtype, rates["bf16"])
    return Roof(hardware.peak_bytes_per_s, flops_per_s, tuple(points))


@dataclass
class _Sum:
    """The work of all kernels of a kind."""

    flops: float = 0.0
    moved_bytes: float = 0.0
    us: float = 0.0


def _points(steps: StepModel, layout: ParallelLayout, phase: Phase, load: Load) -> list[RoofPoint]:
    graph = steps.graph(layout, phase, load.num_tokens)
    sums: dict[str, _Sum] = defaultdict(_Sum)
    for op in graph.ops:
        count, cost = steps.count_of(op.layer), op_cost(graph, op, load)
        time = op_time(graph, op, load, steps.hardware)
        total = sums[op.kind]
        total.flops += count * cost.flops
        total.moved_bytes += count * cost.moved_bytes
        total.us += count * time.total_us
    step_us = sum(total.us for total in sums.values())
    points = []
    for kind, total in sums.items():
        if total.flops and total.moved_bytes:
            intensity = total.flops / total.moved_bytes
            flops_per_s = total.flops / total.us * 1e6
            points.append(RoofPoint(kind, phase, intensity, flops_per_s, total.us / step_us))
    return points
