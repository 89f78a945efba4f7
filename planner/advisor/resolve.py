"""Resolve every `auto`, and keep the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tokenspeed_plan.planner.advisor import advise, draft_depths, rollback
from tokenspeed_plan.planner.advisor.candidate import (
    ALL_CAPABILITIES,
    SUPPORTED,
    Candidate,
    Knobs,
    check_layout,
    layouts,
)
from tokenspeed_plan.planner.advisor.hardware import HardwareSpec
from tokenspeed_plan.planner.advisor.prediction import Predictor
from tokenspeed_plan.planner.advisor.search import Search, SearchResult, matches
from tokenspeed_plan.planner.graph import OpGraph
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.models.config import ModelConfig
from tokenspeed_plan.planner.passes.limits import decode_buckets, prefill_chunk
from tokenspeed_plan.planner.passes.simulate import MIN_GAIN
from tokenspeed_plan.planner.spec import MoeSpec, Spec
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.schema import Decision, Predicted
from tokenspeed_plan.plans.types import DType


def weight_dtype(spec: Spec) -> DType:
    """The dtype of weights and activations.

    Raises:
        SpecError: a valid word whose kernels do not exist yet.
    """
    word = spec.model.weights
    if word in ("fp8", "nvfp4"):
        raise SpecError(f"`model.weights: {word}` is not planned yet", "use `bf16` or `fp32`")
    return "bf16" if word == "bf16" else "fp32"


@dataclass(frozen=True)
class Decided:
    """The layout, the knobs, all decisions with their reasons, and what the workload will see."""

    layout: ParallelLayout
    knobs: Knobs
    depths: Mapping[int, int]  # drafts a step, by decode bucket
    decisions: tuple[Decision, ...]
    predicted: Predicted
    recomputes: bool = False  # not a row of state for each draft


def resolve(spec: Spec, config: ModelConfig, hardware: HardwareSpec) -> Decided:
    """The best of what the runtime replays; beside it the best of all, as advice.

    Raises:
        SpecError: what the spec states is illegal for this model or not planned yet, or nothing
            fits.
    """
    _check_stated(spec, config)
    kept = rollback.kept_first(spec, config, hardware)
    predictors = [Predictor(spec, config, hardware, recomputes=keeps) for keeps in kept]
    predictor, found = _search(predictors, spec.target.count)
    buckets = decode_buckets(spec.workload.concurrency)
    ways = rollback.rollbacks(predictors, found.best.candidate, buckets)
    chosen = rollback.choose(ways)
    if chosen.predictor is not predictor:  # what is promised must be of the way that is taken
        predictor, found = _search([chosen.predictor], spec.target.count)
        ways = rollback.rollbacks(predictors, found.best.candidate, buckets)
        chosen = next(way for way in ways if way.predictor is predictor)
    wide = Search(predictor, ALL_CAPABILITIES, spec.target.count).run()
    wide = wide if wide.predictions else found
    best = found.best.candidate
    speculation = draft_depths.decision(predictor, chosen.table), rollback.decision(ways, chosen)
    decisions = _decisions(predictor, found, wide, speculation)
    by_bucket = {each.bucket: each.depth for each in chosen.table}
    knobs, recomputes = (
        replace(best.knobs, depth=chosen.depth),
        chosen.recomputes and chosen.depth > 0,
    )
    return Decided(
        best.layout,
        knobs,
        by_bucket,
        decisions,
        advise.predicted(predictor, found, wide),
        recomputes,
    )


def _search(predictors: Sequence[Predictor], num_gpus: int) -> tuple[Predictor, SearchResult]:
    """The first way with which anything fits."""
    for predictor in predictors:
        found = Search(predictor, SUPPORTED, num_gpus).run()
        if found.predictions:
            return predictor, found
    raise _refusal(predictors[0])


def _decisions(
    predictor: Predictor, found: SearchResult, wide: SearchResult, speculation: tuple[Decision, ...]
) -> tuple[Decision, ...]:
    spec, hardware = predictor.spec, predictor.hardware
    asked = spec.parallelism != "auto"
    return (
        advise.parallelism(found, asked),
        *speculation,
        advise.disaggregation(predictor, found, wide, spec.disaggregation != "off"),
        Decision(
            name="page_size", value=str(hardware.page_size), reason=f"default of {hardware.name}"
        ),
        advise.chunk(found),
        _STATE_DTYPE,
        _objective(spec, found),
        advise.advice(found, wide),
    )


def _objective(spec: Spec, found: SearchResult) -> Decision:
    levels = ", ".join(f"{name} at most {most:g}" for name, most in found.slo.items())
    missed = (
        f"not met: {found.binding}; this is the nearest plan"
        if found.binding
        else "met"
        if levels
        else ""
    )
    reason = "; ".join(part for part in ("as the spec says", levels, missed) if part)
    return Decision(name="objective", value=spec.objective.minimize, reason=reason)


def _refusal(predictor: Predictor) -> SpecError:
    """Nothing is left: the law that the first layout breaks where all break one, else the memory that one lacks."""
    spec, first = predictor.spec, None
    for layout in layouts(spec.target.count, predictor.config, SUPPORTED):
        if spec.parallelism != "auto" and not matches(layout, spec.parallelism):
            continue
        try:
            check_layout(layout, predictor.config, spec.model.weights)
        except SpecError as error:
            first = first or error
            continue
        chunk = prefill_chunk(
            predictor.hardware.prefill_chunk, spec.workload.max_conversation_tokens
        )
        candidate = Candidate(layout, Knobs(chunk, predictor.hardware.page_size))
        return SpecError(*advise.memory_refusal(predictor, candidate))
    return first or SpecError(
        "no layout is the one that the spec states", "choose another `parallelism`"
    )


_STATE_DTYPE = Decision(
    name="state_dtype",
    value="fp32",
    reason="bf16 state costs 60 to 90 times the error of a bf16 KV cache",
    runner_up="bf16, half the bytes",
)


def streams(graphs: Sequence[OpGraph]) -> Decision:
    """How many streams each program got, and what that is worth."""
    most = max(graph.num_streams for graph in graphs)
    compared = [(graph, graph.runner_up_us) for graph in graphs if graph.runner_up_us is not None]
    times = [
        f"{graph.phase} {graph.time_us:.1f} us, with other streams {us:.1f}"
        for graph, us in compared
    ]
    shorter = sum(us < (1 - MIN_GAIN) * graph.time_us for graph, us in compared)
    if shorter:
        reason = f"{shorter} of {len(graphs)} programs would be shorter with more; the runtime replays {most}"
    elif most == 1:
        reason = (
            f"no branch shortens a program by {MIN_GAIN:.0%}"
            if times
            else "kernels run one after the other"
        )
    else:
        reason = f"{sum(graph.num_streams > 1 for graph in graphs)} of {len(graphs)} programs get shorter"
    return Decision(name="streams", value=str(most), reason=": ".join([reason, *times[-1:]]))


def _check_stated(spec: Spec, config: ModelConfig) -> None:
    """What a spec states by hand must be possible."""
    if spec.draft_vocab and spec.draft_vocab > config.vocab_size:
        raise SpecError(
            f"`speculation.draft_vocab` is {spec.draft_vocab}, `{config.name}` has {config.vocab_size} tokens",
            "leave it out to draft from all of them",
        )
    if spec.draft_vocab and spec.draft_vocab % spec.target.count:
        raise SpecError(
            f"`speculation.draft_vocab` is {spec.draft_vocab}, which {spec.target.count} GPUs cannot share",
            f"name a multiple of {spec.target.count}",
        )
    if spec.serving and spec.serving.kv_dtype == "fp8":
        raise SpecError(
            "`serving.kv_dtype: fp8` is not planned yet",
            "leave it out; `tokenspeed predict` prices it",
        )
    if spec.parallelism == "auto":
        return
    count, asked = spec.target.count, spec.parallelism
    attention = asked.attention.tp if asked.attention else count
    if attention != count or (asked.attention and asked.attention.dp not in (None, 1)):
        raise SpecError(
            f"`parallelism.attention.tp` is {attention} on {count} GPUs, attention data parallelism is not planned yet",
            f"set it to {count}, or `target.count` to {attention}; `tokenspeed predict` prices it",
        )
    if asked.attention and asked.attention.context_split not in (None, 1):
        raise SpecError(
            "`parallelism.attention.context_split` is not planned yet",
            "`tokenspeed predict` prices it",
        )
    if asked.moe is not None:
        _check_moe(asked.moe, count, config)


def _check_moe(asked: MoeSpec, count: int, config: ModelConfig) -> None:
    given = asked.model_fields_set
    tp = asked.tp if "tp" in given else count // asked.ep if "ep" in given else count
    ep = asked.ep if "ep" in given else count // max(tp, 1)
    if config.moe is None and ep != 1:
        raise SpecError(
            f"`{config.name}` has no experts to spread over {ep} GPUs",
            "leave `parallelism.moe` out",
        )
    if tp * ep != count:
        raise SpecError(
            f"moe tp {tp} x ep {ep} is {tp * ep} GPUs, the target has {count}",
            "make their product the count",
        )
