"""From what a search found to what a plan says: decisions with reasons and runners-up, predictions with intervals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from tokenspeed_plan.planner.advisor.candidate import SUPPORTED, Candidate
from tokenspeed_plan.planner.advisor.hardware import GIB, TIME_KINDS
from tokenspeed_plan.planner.advisor.prediction import Prediction, Predictor, digits
from tokenspeed_plan.planner.advisor.search import Rejected, SearchResult
from tokenspeed_plan.plans.schema import Decision, LayerMove, Option, Predicted, Transfers

SHOWN = (
    "turn_time_ms",
    "ttft_ms",
    "tpot_ms",
    "tokens_per_s_user",
    "tokens_per_s_gpu",
    "cost_per_million_tokens_usd",
)
MAX_OPTIONS = 8


def option(prediction: Prediction, reason: str = "") -> Option:
    """A deployment with its numbers."""
    numbers = {name: digits(prediction.metrics[name]) for name in SHOWN}
    return Option(what=str(prediction.candidate), numbers=numbers, reason=reason)


def _refused(rejected: Iterable[Rejected]) -> tuple[Option, ...]:
    """One a reason and layout."""
    seen = {(r.what.partition(";")[0], r.reason): r for r in rejected}
    return tuple(Option(what=r.what, reason=r.reason) for r in list(seen.values())[:MAX_OPTIONS])


def predicted(predictor: Predictor, found: SearchResult, wide: SearchResult) -> Predicted:
    """What the plan promises, and what surrounds it: the front of everything, and what was refused."""
    best = found.best
    memory = predictor.memory(best.candidate.layout)
    knobs, workload = best.candidate.knobs, predictor.spec.workload
    seqs = memory.max_seqs_that_fit(knobs, workload.max_conversation_tokens, 65_536)
    parts = {kind: digits(getattr(best.step, kind)) for kind in TIME_KINDS}
    return Predicted(
        values=best.as_json(),
        low={name: digits(best.interval(name)[0]) for name in best.metrics},
        high={name: digits(best.interval(name)[1]) for name in best.metrics},
        largest_concurrency=seqs,
        largest_context_tokens=memory.max_tokens_that_fit(knobs, workload.concurrency),
        decode_batch=digits(best.served.batch),
        decode_step_us=parts,
        decode_floor_us=digits(best.step.floor_us),
        limited_by=best.step.bound,
        slo_missed=found.binding,
        front=tuple(option(p, _needs(p.candidate)) for p in wide.front[:MAX_OPTIONS]),
        rejected=_refused((*found.rejected, *wide.rejected)),
        transfers=transfers(wide),
    )


def _needs(candidate: Candidate) -> str:
    missing = SUPPORTED.missing(candidate)
    return f"not replayed yet: {', '.join(missing)}" if missing else ""


def parallelism(found: SearchResult, by_hand: bool) -> Decision:
    """The layout, and the layouts that it beat."""
    best, *others = found.by_layout
    name, value = found.objective, best.metrics[found.objective]
    if by_hand:
        reason = "as the spec says"
    elif not others and best.candidate.num_gpus == 1:
        reason = f"one GPU; {name} {value:.4g}"
    elif not others:
        reason = f"the only legal layout that the runtime replays; {name} {value:.4g}"
    else:
        reason = f"least {name} of {len(others) + 1} layouts that the runtime replays: {value:.4g}"
    second = f"{others[0].candidate.layouts}: {others[0].metrics[name]:.4g}" if others else None
    options = tuple(option(p) for p in others[:MAX_OPTIONS])
    return Decision(
        name="parallelism",
        value=best.candidate.layouts,
        reason=reason,
        runner_up=second,
        options=(*options, *_refused(found.rejected)[: MAX_OPTIONS - len(options)]),
    )


def chunk(found: SearchResult) -> Decision:
    """The prefill chunk, and the others of the same layout."""
    best = found.best
    same = [p for p in found.ranked if p.candidate.layout == best.candidate.layout]
    others = [
        p for p in same if p.candidate.knobs.prefill_chunk != best.candidate.knobs.prefill_chunk
    ]
    name = found.objective
    tokens = best.candidate.knobs.prefill_chunk
    reason = f"{name} {best.metrics[name]:.4g}; a chunk reads every weight again, and decode waits for it"
    second = (
        f"{others[0].candidate.knobs.prefill_chunk}: {others[0].metrics[name]:.4g}"
        if others
        else None
    )
    return Decision(
        name="prefill_chunk",
        value=str(tokens),
        reason=reason,
        runner_up=second,
        options=tuple(option(p) for p in others[:MAX_OPTIONS]),
    )


def advice(found: SearchResult, wide: SearchResult) -> Decision:
    """The best deployment of all, whether or not the runtime replays it yet."""
    best, now, name = wide.best, found.best, wide.objective
    missing = SUPPORTED.missing(best.candidate)
    gain = f"{name} {best.metrics[name]:.4g}, this plan {now.metrics[name]:.4g}"
    reason = (
        f"{gain}; not replayed yet: {', '.join(missing)}"
        if missing
        else f"{gain}: this plan is the best we know"
    )
    second = next((p for p in wide.by_layout[1:]), None)
    return Decision(
        name="advice",
        value=str(best.candidate) if missing else "this plan",
        reason=reason,
        runner_up=f"{second.candidate}: {second.metrics[name]:.4g}" if second else None,
        options=tuple(option(p, _needs(p.candidate)) for p in wide.by_layout[:MAX_OPTIONS]),
    )


def disaggregation(
    predictor: Predictor, found: SearchResult, wide: SearchResult, asked: bool
) -> Decision:
    """One pool; the best split, its numbers, and whether it would be worth it."""
    if not asked:
        return Decision(name="disaggregation", value="off", reason="as the spec says")
    split = [p for p in wide.ranked if p.candidate.prefill is not None]
    later = "prefill and decode pools are not built yet"
    if not split:
        few = (
            "one GPU cannot be split" if found.best.candidate.num_gpus == 1 else "no two pools fit"
        )
        return Decision(name="disaggregation", value="off", reason=f"{later}; {few}")
    one = next((p for p in wide.ranked if p.candidate.prefill is None), found.best)
    verdict, options = _compare(one, split[0], wide.objective), tuple(option(p) for p in split[:3])
    return Decision(
        name="disaggregation",
        value="off",
        reason=f"{later}; {verdict}",
        runner_up=str(split[0].candidate),
        options=options,
    )


def _compare(one: Prediction, split: Prediction, objective: str) -> str:
    transfer = split.transfer
    assert transfer is not None
    better = split.metrics[objective] < one.metrics[objective]
    return (
        f"{'do' if better else 'do not'} split: {objective} {split.metrics[objective]:.4g} with, "
        f"{one.metrics[objective]:.4g} without; ttft_ms {split.metrics['ttft_ms']:.4g} with, "
        f"{one.metrics['ttft_ms']:.4g} without; {transfer.size_bytes / 1e6:.0f} MB a turn by {transfer.transport}, "
        f"{transfer.exposed_us:.0f} us of it exposed"
    ) + ("; warning: TCP" if transfer.transport == "tcp" else "")


def transfers(wide: SearchResult) -> Transfers | None:
    """The schedule of the best split deployment, where there is one."""
    split = next((p for p in wide.ranked if p.candidate.prefill is not None), None)
    if split is None or split.transfer is None:
        return None
    one = next((p for p in wide.ranked if p.candidate.prefill is None), split)
    moves = tuple(
        LayerMove(
            layer=move.layer,
            size_bytes=move.size_bytes,
            start_us=digits(move.start_us),
            end_us=digits(move.end_us),
        )
        for move in split.transfer.layers
    )
    known = {
        key: value
        for key, value in asdict(split.transfer).items()
        if key in ("transport", "size_bytes")
    }
    return Transfers(
        **known,
        bytes_per_s=digits(split.transfer.bytes_per_s),
        exposed_us=digits(split.transfer.exposed_us),
        ttft_ms_with=digits(split.metrics["ttft_ms"]),
        ttft_ms_without=digits(one.metrics["ttft_ms"]),
        layers=moves,
    )


def memory_refusal(predictor: Predictor, candidate: Candidate) -> tuple[str, str]:
    """What does not fit, as an error and a hint."""
    memory, hardware = predictor.fullest(candidate), predictor.hardware
    parts = asdict(memory)
    rows = ", ".join(
        f"{name} {parts[name] / GIB:.2f}"
        for name in (*sorted(parts.keys() - {"reserved"}), "reserved")
    )
    workload = predictor.spec.workload
    most = predictor.memory(candidate.layout).max_seqs_that_fit(
        candidate.knobs, workload.max_conversation_tokens, 65_536
    )
    what = (
        f"{most} sequences of {workload.max_conversation_tokens} tokens would fit"
        if most
        else "not even one sequence fits"
    )
    return (
        f"needs {memory.total / GIB:.2f} GiB on each {hardware.name}, which has {hardware.memory_bytes / GIB:.2f}"
        f" ({rows} GiB)",
        f"raise `target.count`, or lower `workload.concurrency` or its tokens: {what}",
    )
