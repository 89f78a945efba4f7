"""Why: every decision of the advisor with its reason, its runner-up and the other options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby

from tokenspeed_plan.planner.advisor.candidate import Candidate
from tokenspeed_plan.planner.advisor.draft_depths import WORTH_A_DRAFT, BucketDepth
from tokenspeed_plan.planner.advisor.numbers import digits
from tokenspeed_plan.planner.advisor.predicted import (
    MAX_OPTIONS,
    max_concurrency,
    missing_option,
    not_planned,
    option,
    refused,
)
from tokenspeed_plan.planner.advisor.prediction import Prediction, Predictor
from tokenspeed_plan.planner.advisor.ranking import SearchResult
from tokenspeed_plan.planner.advisor.rollback import Rollback
from tokenspeed_plan.planner.advisor.transfer import Transfer
from tokenspeed_plan.planner.ledger import AS_STATED, Ledger
from tokenspeed_plan.planner.machines.hardware import HardwareSpec
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.schema import Option
from tokenspeed_plan.plans.types import GIB, DType


def record_parallelism(
    ledger: Ledger, result: SearchResult, num_layouts: int, stated: bool
) -> None:
    """Record the layout, and the layouts that it beat."""
    best, *others = result.by_layout
    name = result.objective
    value = f"{best.metrics[name]:.4g}"
    if stated:
        reason = AS_STATED
    elif num_layouts > 1:
        reason = f"least {name} of {num_layouts} layouts that a plan can have: {value}"
    elif best.candidate.num_gpus == 1:
        reason = f"one GPU; {name} {value}"
    else:
        reason = f"the only legal layout that a plan can have; {name} {value}"
    runner_up = None
    if others:
        runner_up = f"{others[0].candidate.layouts}: {others[0].metrics[name]:.4g}"
    options = (*map(option, others), *refused(result.rejected))
    ledger.record("parallelism", best.candidate.layouts, reason, runner_up, options[:MAX_OPTIONS])


def record_speculation(ledger: Ledger, predictor: Predictor, table: Sequence[BucketDepth]) -> None:
    """Record the drafts of each bucket, and the table that shows where their number changes."""
    spec = predictor.spec
    if spec.speculation == "off":
        ledger.record("speculation", "off", AS_STATED)
        return
    if not predictor.config.num_mtp_layers:
        reason = predictor.config.no_drafts_reason or "the model has no layer that drafts"
        ledger.record("speculation", "off", reason)
        return
    how = f"fewest within {WORTH_A_DRAFT:.0%} of the least time a token, by batch"
    if spec.stated_depth is not None:
        how = AS_STATED
    rates = ", ".join(f"{rate:g}" for rate in predictor.acceptance)
    vocab = ""
    if spec.draft_vocab:
        vocab = f" (of the first {spec.draft_vocab} tokens)"
    gains = ", ".join(f"{each.gain:.2f} at {each.bucket}" for each in table)
    reason = f"{how}; with {rates} of drafts{vocab} accepted, times the tokens without: {gains}"
    options = tuple(_bucket_option(each) for each in table)
    ledger.record("speculation", _depths_in_words(table), reason, options=options)


def _depths_in_words(table: Sequence[BucketDepth]) -> str:
    """One word where all buckets draft alike, else each depth with its buckets."""
    parts = []
    for depth, run in groupby(table, key=lambda each: each.depth):
        word = f"depth {depth}" if depth else "off"
        buckets = ", ".join(str(each.bucket) for each in run)
        parts.append((word, buckets))
    if len(parts) == 1:
        return parts[0][0]
    return ", ".join(f"{word} at batch {buckets}" for word, buckets in parts)


def _bucket_option(each: BucketDepth) -> Option:
    return Option(
        what=f"batch {each.bucket}, us a token",
        numbers={f"{depth} drafts": digits(us) for depth, us in each.token_us.items()},
        reason=f"{each.depth} drafts" if each.depth else "none",
    )


def record_rollback(ledger: Ledger, ways: Sequence[Rollback], chosen: Rollback) -> None:
    """Record how rejected drafts are taken back, and what the other way would take."""
    if not chosen.depth:
        ledger.record("rollback", "none", "nothing is drafted")
        return
    others = [way for way in ways if way is not chosen]
    if not others:
        ledger.record("rollback", str(chosen), AS_STATED)
        return
    (other,) = others
    gain = other.token_us / chosen.token_us
    reason = (
        f"{chosen.state_bytes / GIB:.2f} GiB of state, {other.state_bytes / GIB:.2f} with {other}; "
        f"{gain:.3f} times its tokens"
    )
    if other.depth != chosen.depth:
        reason += f", which drafts at most {other.depth}"
    if not other.fits:
        reason += f", which does not fit: {other.memory.total / GIB:.1f} GiB"
    ledger.record("rollback", str(chosen), reason, str(other))


def record_disaggregation(
    ledger: Ledger, spec: Spec, result: SearchResult, unrestricted: SearchResult
) -> None:
    """Record whether there are two pools, and what the other way would give."""
    plan = result.best
    if spec.disaggregation == "off":
        ledger.record("disaggregation", "off", AS_STATED)
    elif plan.candidate.prefill is not None:
        _record_two_pools(ledger, spec, plan, unrestricted)
    else:
        _record_one_pool(ledger, plan, unrestricted)


def _record_two_pools(
    ledger: Ledger, spec: Spec, plan: Prediction, unrestricted: SearchResult
) -> None:
    """Both pools have the same limits, so that whole slots are handed over."""
    prefill, transfer = plan.candidate.prefill, plan.transfer
    assert prefill is not None and transfer is not None
    name, other = unrestricted.objective, unrestricted.unsplit
    reason = AS_STATED
    if spec.disaggregation == "auto":
        reason = f"{name} {plan.metrics[name]:.4g}"
    reason += f"; {_handover(transfer)}"
    runner_up = None
    if other is not None:
        runner_up = f"one pool, {other.candidate}: {name} {other.metrics[name]:.4g}"
    value = f"{prefill.num_ranks} prefill, {plan.candidate.layout.num_ranks} decode"
    ledger.record("disaggregation", value, reason, runner_up)


def _record_one_pool(ledger: Ledger, plan: Prediction, unrestricted: SearchResult) -> None:
    split = [each for each in unrestricted.ranked if each.candidate.prefill is not None]
    if not split:
        why = "no two pools fit"
        if plan.candidate.num_gpus == 1:
            why = "one GPU cannot be split"
        ledger.record("disaggregation", "off", why)
        return
    verdict = _split_verdict(plan, split[0], unrestricted)
    missing = not_planned(split[0].candidate)
    ledger.record(
        "disaggregation",
        "off",
        "; ".join(part for part in (verdict, missing) if part),
        str(split[0].candidate),
        tuple(option(each) for each in split[:3]),
    )


def _split_verdict(plan: Prediction, split: Prediction, result: SearchResult) -> str:
    """Whether two pools rank before this plan and before every other single pool."""
    transfer = split.transfer
    assert transfer is not None
    old, new, name = plan.metrics, split.metrics, result.objective
    others = [plan]
    if result.unsplit:
        others.append(result.unsplit)
    advice = "do not split"
    if result.order(split) < min(map(result.order, others)):
        advice = "do split"
        if new[name] >= old[name]:
            advice += ", for the service levels"
    parts = [
        f"{advice}: {name} {new[name]:.4g} with, {old[name]:.4g} in this plan",
        f"ttft_ms {new['ttft_ms']:.4g} with, {old['ttft_ms']:.4g} in this plan",
        _handover(transfer),
    ]
    return "; ".join(parts)


def _handover(transfer: Transfer) -> str:
    """What a turn moves from pool to pool, in words."""
    text = (
        f"{transfer.size_bytes / 1e6:.0f} MB a turn by {transfer.transport}, "
        f"{transfer.exposed_us:.0f} us of it exposed"
    )
    if transfer.transport == "tcp":
        text += "; warning: TCP"
    return text


def record_page_size(ledger: Ledger, hardware: HardwareSpec) -> None:
    """Record the tokens of a page."""
    ledger.record("page_size", str(hardware.page_size), f"default of {hardware.name}")


def record_prefill_chunk(ledger: Ledger, result: SearchResult) -> None:
    """Record the prefill chunk, and the others that were tried with the same layout."""
    best, name = result.best, result.objective
    chunk = best.candidate.knobs.prefill_chunk
    others = [each for each in result.ranked if _differs_in_chunk(each, best)]
    runner_up = None
    if others:
        second = others[0]
        runner_up = f"{second.candidate.knobs.prefill_chunk}: {second.metrics[name]:.4g}"
    cost = "a chunk reads every weight again, and decode waits for it"
    reason = f"{name} {best.metrics[name]:.4g}; {cost}"
    options = tuple(option(each) for each in others[:MAX_OPTIONS])
    ledger.record("prefill_chunk", str(chunk), reason, runner_up, options)


def _differs_in_chunk(one: Prediction, other: Prediction) -> bool:
    if one.candidate.layout != other.candidate.layout:
        return False
    return one.candidate.knobs.prefill_chunk != other.candidate.knobs.prefill_chunk


def record_kv_dtype(ledger: Ledger, spec: Spec, result: SearchResult) -> None:
    """Record how keys and values are stored, where that is not the dtype of the activations."""
    chosen = result.best.candidate.knobs.kv_dtype
    asked = spec.serving.kv_dtype if spec.serving else None
    if chosen == "bf16" and asked != "auto":
        return
    reason = AS_STATED
    if asked == "auto":
        reason = f"{result.objective} {result.best.metrics[result.objective]:.4g}, the better one"
    if chosen == "fp8":
        reason += (
            "; e4m3 with the scale of the checkpoint, or 1, as in vLLM; kernels convert what they "
            "load, prices are bytes"
        )
    ledger.record("kv_dtype", chosen, reason, {"fp8": "bf16", "bf16": "fp8"}[chosen])


def record_state_dtype(ledger: Ledger, has_state: bool, stored: DType | None) -> None:
    """Record the dtype of recurrent state; `stored` None for as it is computed."""
    if not has_state:
        ledger.record("state_dtype", "none", "the model has no recurrent state")
        return
    if stored:
        reason = f"{AS_STATED}; it is computed in fp32 and rounded after each step"
        ledger.record("state_dtype", stored, reason, "fp32, twice the bytes")
        return
    ledger.record(
        "state_dtype",
        "fp32",
        "bf16 state costs 60 to 90 times the error of a bf16 KV cache",
        "bf16, half the bytes",
    )


def record_objective(ledger: Ledger, spec: Spec, result: SearchResult) -> None:
    """Record what is minimised, and which service levels are met."""
    levels = ", ".join(f"{name} at most {limit:g}" for name, limit in result.slo.items())
    met = ""
    if result.binding:
        met = f"not met: {result.binding}; this is the nearest plan"
    elif levels:
        met = "met"
    reason = "; ".join(part for part in (AS_STATED, levels, met) if part)
    ledger.record("objective", spec.objective.minimize, reason)


def record_service(ledger: Ledger, spec: Spec, result: SearchResult) -> None:
    """Record whether the service levels and the arrivals are met, where the spec has any."""
    best = result.best
    arrivals = spec.workload.arrivals_per_s
    if not result.slo and arrivals is None:
        return
    value = "met"
    if result.binding:
        value = "missed"
    if best.turn.saturated:
        value = "overloaded"
    reason = "; ".join(service_lines(best, result.slo, arrivals))
    options: tuple[Option, ...] = ()
    if best.simulated:
        numbers = {name: digits(ms) for name, ms in best.simulated.items()}
        options = (Option(what="simulated load", numbers=numbers),)
    ledger.record("service_levels", value, reason, options=options)


def service_lines(
    best: Prediction, slo: Mapping[str, float], arrivals_per_s: float | None
) -> list[str]:
    """Each service level with what it is judged by, and what that hides."""
    lines = []
    for name, limit in slo.items():
        low, high = best.interval(name)
        line = (
            f"{name} {best.level(name):.4g} ({low:.4g} to {high:.4g}), at most {limit:g}: "
            f"{_judge(best, name)}"
        )
        first_ms = best.metrics["first_turn_ttft_ms"]
        if name == "ttft_ms" and best.turns > 1:
            line += f"; a first turn, one of {best.turns}, takes {first_ms:.4g}"
            if best.metrics[name] <= limit < first_ms:
                line += ", which is over it"
        lines.append(line)
    if best.turn.saturated:
        lines.append(f"{arrivals_per_s:g} turns a second are more than it can answer")
    return lines


def _judge(best: Prediction, name: str) -> str:
    """What a service level is judged by."""
    if name in best.metrics:
        return "the mean over the turns"
    return "of the turns of the simulated load"


def record_advice(
    ledger: Ledger, spec: Spec, result: SearchResult, unrestricted: SearchResult
) -> None:
    """Record the best deployment of all, whether or not a plan can hold it yet."""
    best, plan, name = unrestricted.best, result.best, unrestricted.objective
    count = spec.target.count
    if best.candidate.layouts == plan.candidate.layouts:
        value = "this plan"
        reason = f"{name} {plan.metrics[name]:.4g}: this plan is the best we know"
    else:
        value = str(best.candidate)
        gain = f"{name} {best.metrics[name]:.4g}, this plan {plan.metrics[name]:.4g}"
        missing = not_planned(best.candidate)
        reason = "; ".join(part for part in (gain, missing) if part)
    if best.candidate.num_gpus < count:
        reason += f"; it uses {best.candidate.num_gpus} of {count} GPUs"
    runner_up = None
    if len(unrestricted.by_layout) > 1:
        second = unrestricted.by_layout[1]
        runner_up = f"{second.candidate}: {second.metrics[name]:.4g}"
    ledger.record("advice", value, reason, runner_up, _best_layouts(unrestricted.by_layout))


def _best_layouts(predictions: Iterable[Prediction]) -> tuple[Option, ...]:
    return tuple(missing_option(each) for each in list(predictions)[:MAX_OPTIONS])


def memory_refusal(predictor: Predictor, candidate: Candidate) -> tuple[str, str]:
    """What does not fit, as an error and a hint."""
    memory, hardware = predictor.fullest(candidate), predictor.hardware
    sizes = asdict(memory)
    names = [*sorted(sizes.keys() - {"reserved"}), "reserved"]
    parts = ", ".join(f"{name} {sizes[name] / GIB:.2f}" for name in names)
    tokens = predictor.spec.workload.max_conversation_tokens
    max_seqs = max_concurrency(predictor, candidate)
    fitting = "not even one sequence fits"
    if max_seqs:
        fitting = f"{max_seqs} sequences of {tokens} tokens would fit"
    return (
        f"needs {memory.total / GIB:.2f} GiB on each {hardware.name}, "
        f"which has {hardware.memory_bytes / GIB:.2f} ({parts} GiB)",
        f"raise `target.count`, or lower `workload.concurrency` or its tokens: {fitting}",
    )
