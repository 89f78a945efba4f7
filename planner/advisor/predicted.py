"""What a plan promises: predicted numbers, their intervals, the front, and what was refused."""

from __future__ import annotations

from collections.abc import Iterable

from tokenspeed_plan.planner.advisor.candidate import SUPPORTED, Candidate
from tokenspeed_plan.planner.advisor.numbers import digits
from tokenspeed_plan.planner.advisor.prediction import Prediction, Predictor
from tokenspeed_plan.planner.advisor.ranking import Rejected, SearchResult
from tokenspeed_plan.planner.advisor.transfer import Transfer
from tokenspeed_plan.planner.machines.hardware import TIME_KINDS
from tokenspeed_plan.planner.spec import MAX_CONCURRENCY
from tokenspeed_plan.plans.schema import LayerMove, Option, Predicted, Transfers

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


def missing_option(prediction: Prediction) -> Option:
    """A deployment with its numbers, and what it needs that no plan can hold yet."""
    return option(prediction, not_planned(prediction.candidate))


def not_planned(candidate: Candidate) -> str:
    """What no plan can hold yet, as a clause; empty if one can hold all of it."""
    missing = SUPPORTED.missing(candidate)
    if not missing:
        return ""
    return f"not planned yet: {', '.join(missing)}"


def refused(rejected: Iterable[Rejected]) -> tuple[Option, ...]:
    """The rejected deployments, one for each layout and reason."""
    seen: dict[tuple[str, str], Rejected] = {}
    for each in rejected:
        layout = each.what.partition(";")[0]
        seen[layout, each.reason] = each
    first = list(seen.values())[:MAX_OPTIONS]
    return tuple(Option(what=each.what, reason=each.reason) for each in first)


def max_concurrency(predictor: Predictor, candidate: Candidate) -> int:
    """The largest number of the spec's longest conversations that fit."""
    tokens = predictor.spec.workload.max_conversation_tokens
    memory = predictor.memory(candidate.layout)
    return memory.max_seqs_that_fit(candidate.knobs, tokens, MAX_CONCURRENCY)


def max_context_tokens(predictor: Predictor, candidate: Candidate) -> int:
    """The longest sequence of which the spec's concurrency fits."""
    memory = predictor.memory(candidate.layout)
    return memory.max_tokens_that_fit(candidate.knobs, predictor.spec.workload.num_seqs)


def predicted(predictor: Predictor, result: SearchResult, unrestricted: SearchResult) -> Predicted:
    """The numbers of the plan.

    Args:
        predictor: of both searches.
        result: of the search among what the runtime replays.
        unrestricted: of the search among everything.
    """
    best = result.best
    intervals = {name: best.interval(name) for name in best.metrics}
    return Predicted(
        values=best.as_json(),
        low={name: digits(low) for name, (low, _) in intervals.items()},
        high={name: digits(high) for name, (_, high) in intervals.items()},
        largest_concurrency=max_concurrency(predictor, best.candidate),
        largest_context_tokens=max_context_tokens(predictor, best.candidate),
        decode_batch=digits(best.turn.batch),
        decode_step_us={kind: digits(getattr(best.step, kind)) for kind in TIME_KINDS},
        decode_floor_us=digits(best.step.floor_us),
        limited_by=best.step.bound,
        slo_missed=result.binding,
        front=tuple(missing_option(each) for each in unrestricted.front[:MAX_OPTIONS]),
        rejected=refused((*result.rejected, *unrestricted.rejected)),
        transfers=_transfers(unrestricted, best),
    )


def _transfers(unrestricted: SearchResult, plan: Prediction) -> Transfers | None:
    """The schedule of the best deployment with two pools, where there is one, beside the plan."""
    split = unrestricted.split
    if split is None or split.transfer is None:
        return None
    return Transfers(
        transport=split.transfer.transport,
        size_bytes=split.transfer.size_bytes,
        bytes_per_s=digits(split.transfer.bytes_per_s),
        exposed_us=digits(split.transfer.exposed_us),
        ttft_ms_with=digits(split.metrics["ttft_ms"]),
        ttft_ms_without=digits(plan.metrics["ttft_ms"]),
        layers=_moves(split.transfer),
    )


def _moves(transfer: Transfer) -> tuple[LayerMove, ...]:
    return tuple(
        LayerMove(
            layer=each.layer,
            size_bytes=each.size_bytes,
            start_us=digits(each.start_us),
            end_us=digits(each.end_us),
        )
        for each in transfer.layers
    )
