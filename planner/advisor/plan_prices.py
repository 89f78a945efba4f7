"""What the programs of a frozen plan cost by the advisor: for a batch, and as a roofline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tokenspeed_plan.codegen.page.plan_page import Roof, RoofPoint
from tokenspeed_plan.planner.advisor.candidate import Candidate, Knobs
from tokenspeed_plan.planner.advisor.numbers import digits
from tokenspeed_plan.planner.advisor.plan_steps import PlanSteps
from tokenspeed_plan.planner.advisor.pool_times import pair_times, plan_sizes
from tokenspeed_plan.planner.advisor.prediction import Predictor
from tokenspeed_plan.planner.advisor.step_model import StepModel
from tokenspeed_plan.planner.compile import find_model, program_load
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.machines.target import target_hardware
from tokenspeed_plan.planner.passes.cost import Load, busiest_hits
from tokenspeed_plan.planner.passes.op_terms import EXPERTS
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.kernel_file import kind_of
from tokenspeed_plan.plans.ops import integer
from tokenspeed_plan.plans.schema import (
    BatchSize,
    Call,
    CallCost,
    CollectiveCall,
    KernelSpec,
    Plan,
    Pool,
    Program,
)
from tokenspeed_plan.plans.types import DType

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.simulation.pool_pair import PairTimes


def step_prediction(
    plan: Plan, bundle: Path, phase: str, tokens: int, seqs: int, context: int, depth: int = 0
) -> dict[str, Any]:
    """The predicted microseconds of one step, with their interval and their kinds.

    Args:
        plan: the frozen plan.
        bundle: its folder, near which the model is looked up.
        phase: `decode` or `prefill`.
        tokens: of the step, for prefill.
        seqs: sequences of the batch; prompts of a prefill step share its tokens.
        context: tokens of each sequence, those of the step included.
        depth: drafts of each sequence.

    Raises:
        SpecError: the plan's model is not where its spec says.
    """
    steps, layout = step_model(plan, bundle)
    hardware = steps.hardware
    if phase == "decode":
        step = steps.decode(layout, seqs, context, depth, kv_dtype_of(plan))
    else:
        before = max(context - tokens // seqs, 0)
        step = steps.prefill(layout, tokens, before, kv_dtype_of(plan), depth, seqs)
    error_us = step.error_us(hardware)
    interval = (step.total_us - error_us, step.total_us + error_us)
    return {
        "predicted_us": digits(step.total_us),
        "predicted_interval_us": [digits(end) for end in interval],
        "predicted_kinds_us": {kind: digits(getattr(step, kind)) for kind in hardware.errors},
    }


def kv_dtype_of(plan: Plan) -> DType:
    """How a plan keeps keys and values, in the advisor's words."""
    for buffer in plan.pool.buffers:
        if buffer.arena == "kv_cache" and buffer.tensor.dtype == "fp8":
            return "fp8"
    return "bf16"


def batch_prediction(
    plan: Plan, bundle: Path, rows: Sequence[tuple[int, int]], shared: int = 0
) -> dict[str, float]:
    """What a batch would take on a plan, from its first row to its last.

    Args:
        plan: the frozen plan.
        bundle: its folder, near which the model is looked up.
        rows: each with the tokens of its prompt and of its answer; at least one.
        shared: tokens with which all prompts begin, fewer than any of them has.

    Returns:
        Tokens a second of prompts and of answers, and where the seconds go.

    Raises:
        SpecError: the plan's model is not where its spec says.
    """
    pool, limits = plan.pool, plan.pool.limits
    predictor = _predictor(plan, bundle)
    depths = {each.bucket: each.depth for each in pool.programs if each.phase == "decode"}
    knobs = Knobs(limits.max_tokens, limits.page_size, limits.max_depth, kv_dtype_of(plan))
    candidate = Candidate(_layout_of(plan.pool), knobs)
    batch = predictor.batch(candidate, depths, limits.max_seqs)
    interleaved, gathered = limits.interleaved_tokens, limits.gathered_tokens
    return batch.run(rows, limits.max_seqs, interleaved, gathered, shared).as_json()


def drafts_accepted(plan: Plan, bundle: Path) -> tuple[float, ...]:
    """The share of drafts that are accepted if those before were, by place.

    Raises:
        SpecError: the plan's model is not where its spec says.
    """
    return _predictor(plan, bundle).acceptance


def _predictor(plan: Plan, bundle: Path) -> Predictor:
    limits = plan.pool.limits
    spec = spec_of(plan).with_concurrency(limits.max_seqs)
    return Predictor(
        spec,
        find_model(spec, bundle).config,
        target_hardware(spec),
        rollback=limits.rollback,
    )


def step_floor_bytes(plan: Plan, phase: str, bucket: int, batch: tuple[int, int, int]) -> float:
    """Bytes of weights and states that a step of a program reads and writes at least.

    Args:
        plan: the frozen plan.
        phase: `decode` or `prefill`.
        bucket: of the program.
        batch: tokens, sequences, and tokens of a sequence, on average.
    """
    kernels = {kernel.name: kernel for kernel in plan.kernels}
    program = next(
        program
        for program in plan.pool.programs
        if (program.phase, program.bucket) == (phase, bucket)
    )
    load = Load(*batch)
    total = 0.0
    for step in program.steps:
        if isinstance(step, Call):
            size = _batch_size(plan, kernels[step.kernel], step.cost, load)
            total += step.cost.at(size).floor_bytes
    return total


def spec_of(plan: Plan) -> Spec:
    """The spec that a plan was made from.

    Raises:
        SpecError: what the plan holds is no spec of this version.
    """
    try:
        return Spec.model_validate(plan.spec)
    except ValidationError as error:
        raise SpecError(
            f"the spec in the plan of `{plan.model.name}` is not one of this version",
            "make the plan again with `tokenspeed plan SPEC -o DIR`",
        ) from error


def step_model(plan: Plan, bundle: Path) -> tuple[StepModel, ParallelLayout]:
    """The advisor's model of a plan's steps, and the plan's layout.

    Raises:
        SpecError: the plan's model is not where its spec says.
    """
    spec = spec_of(plan)
    steps = StepModel(
        find_model(spec, bundle).config,
        target_hardware(spec),
        weights=spec.model.weights,
        skew=spec.workload.routing_skew,
        rollback=plan.pool.limits.rollback,
        draft_vocab=spec.draft_vocab,
        grammar=spec.grammar,
        penalties=spec.penalties,
        head=spec.model.head,
        stored_state=spec.stored_state,
    )
    return steps, _layout_of(plan.pool)


def plan_steps(plan: Plan, bundle: Path) -> PlanSteps:
    """What a plan's steps take, for any batch.

    Raises:
        SpecError: the plan's model is not where its spec says.
    """
    steps, layout = step_model(plan, bundle)
    programs, limits = plan.pool.programs, plan.pool.limits
    decode = [program for program in programs if program.phase == "decode"]
    return PlanSteps(
        steps,
        layout,
        {program.bucket: program.depth for program in decode},
        any(program.captured for program in decode),
        limits.max_tokens,
        limits.max_seq_len,
        kv_dtype_of(plan),
    )


def plan_pair(plan: Plan, times: PlanSteps) -> PairTimes | None:
    """What belongs to the pool of prompts of a plan; None where one pool does all.

    Args:
        plan: the frozen plan.
        times: of the pool that answers.
    """
    if not plan.has_two_pools:
        return None
    layout = _layout_of(plan.pools[1])
    num_gpus = sum(pool.layout.num_ranks for pool in plan.pools)
    return pair_times(times, layout, plan_sizes(plan), times.steps.hardware, num_gpus)


def _layout_of(pool: Pool) -> ParallelLayout:
    layout = pool.layout
    return ParallelLayout(layout.attention.tp, layout.moe.tp, layout.moe.ep)


def roofline(plan: Plan) -> Roof:
    """Kernels of the smallest decode and of the largest prefill, by kind, under the peak rates.

    Both programs are full, with the context that the plan is priced for.

    Raises:
        SpecError: the plan's GPU has no profile here.
    """
    spec = spec_of(plan)
    hardware = target_hardware(spec)
    programs = plan.pool.programs
    decode = min((p for p in programs if p.phase == "decode"), key=lambda p: p.bucket)
    prefill = max((p for p in programs if p.phase == "prefill"), key=lambda p: p.bucket)
    points = [*_points(plan, decode, spec), *_points(plan, prefill, spec)]
    rates = hardware.matrix_flops_per_s
    flops_per_s = rates.get(plan.model.dtype, rates["bf16"])
    return Roof(hardware.peak_bytes_per_s, flops_per_s, tuple(points))


@dataclass
class _Sum:
    """The work of all kernels of a kind."""

    flops: float = 0.0
    moved_bytes: float = 0.0
    us: float = 0.0


def _points(plan: Plan, program: Program, spec: Spec) -> list[RoofPoint]:
    """The kinds of kernels of a program that multiply something."""
    kernels = {kernel.name: kernel for kernel in plan.kernels}
    load = program_load(program.phase, program.max_tokens, program.bucket, spec)
    sums: dict[str, _Sum] = defaultdict(_Sum)
    step_us = 0.0
    for step in program.steps:
        if isinstance(step, CollectiveCall):
            step_us += step.predicted_us
        if not isinstance(step, Call):
            continue
        kernel = kernels[step.kernel]
        work = step.cost.at(_batch_size(plan, kernel, step.cost, load))
        total = sums[kind_of(kernel)]
        total.flops += work.flops
        total.moved_bytes += work.moved_bytes
        total.us += step.predicted_us
        step_us += step.predicted_us
    points = []
    for kind, total in sums.items():
        if total.flops and total.moved_bytes:
            intensity = total.flops / total.moved_bytes
            flops_per_s = total.flops / total.us * 1e6
            share = total.us / step_us
            points.append(RoofPoint(kind, program.phase, intensity, flops_per_s, share))
    return points


def _batch_size(plan: Plan, kernel: KernelSpec, cost: CallCost, load: Load) -> BatchSize:
    """The load with the experts that a call is expected to hit.

    A pass that drafts a token works on one token of each sequence, so its cost is per sequence.
    """
    tokens = load.num_tokens if cost.products.per_token else load.num_seqs
    hits = 0.0
    for part in kernel.parts:
        if part.kind in EXPERTS:
            ways = part.rank_attrs["expert_start"].mod if part.rank_attrs else 1
            local_experts = integer(part.attrs, "num_experts")
            hits = busiest_hits(local_experts, ways, _top_k(plan), tokens)
    return BatchSize(load.num_tokens, load.num_seqs, load.context_tokens, hits)


def _top_k(plan: Plan) -> int:
    """Experts that each token chooses."""
    parts = (part for kernel in plan.kernels for part in kernel.parts)
    return next(integer(part.attrs, "top_k") for part in parts if part.kind == "topk")
