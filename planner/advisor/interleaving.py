"""Prefill between decode steps: how many tokens of prompts may come before the next token.

A step of a long chunk keeps everybody else waiting. Where tokens would take longer than the service
level, less of a prompt is computed at once; that makes first tokens later, which is priced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from tokenspeed_plan.planner.advisor.prediction import Prediction, Predictor
from tokenspeed_plan.planner.advisor.ranking import SearchResult


@dataclass(frozen=True, slots=True)
class Interleaving:
    """The limit, what the workload sees with it, and the reason.

    Attributes:
        tokens: of prompts between two decode steps; None where a chunk is not limited.
        prediction: of the plan with this limit.
        reason: in words.
    """

    tokens: int | None
    prediction: Prediction
    reason: str


def interleave(
    predictor: Predictor, result: SearchResult, depths: Mapping[int, int]
) -> Interleaving:
    """Limit prefill where a token takes longer than its service level, and that helps.

    Args:
        predictor: of the plan.
        result: whose best is planned, without a limit.
        depths: drafts of a step by decode bucket.
    """
    best = result.best
    allowed_ms = result.slo.get("tpot_ms")
    if allowed_ms is None:
        return Interleaving(None, best, "a chunk: the spec names no time per token")
    value = best.metrics["tpot_ms"]
    if value <= allowed_ms:
        reason = f"a chunk: tpot_ms {value:.4g} is within {allowed_ms:g} without a limit"
        return Interleaving(None, best, reason)
    if best.concurrency == 1:
        return Interleaving(None, best, "a chunk: nobody else waits while a prompt is computed")
    knobs = best.candidate.knobs

    def tpot_ms(tokens: int) -> float:
        limited = predictor.predict(best.candidate, depths, tokens)
        return limited.metrics["tpot_ms"]

    tokens = most_within(allowed_ms, tpot_ms, knobs.page_size, knobs.prefill_chunk)
    limited = predictor.predict(best.candidate, depths, tokens)
    compared = _compared(limited, best)
    if limited.metrics["tpot_ms"] > allowed_ms or result.excess(limited) >= result.excess(best):
        reason = f"a chunk: at most {tokens} tokens would not meet the service levels, {compared}"
        return Interleaving(None, best, reason)
    reason = f"a token within {allowed_ms:g} ms, {compared}"
    if tokens <= knobs.page_size:
        reason += "; warning: one page of a prompt between two decode steps makes its steps many"
    return Interleaving(tokens, limited, reason)


def with_best(result: SearchResult, prediction: Prediction) -> SearchResult:
    """The result with another prediction of its best deployment in place of the one it has."""
    best = result.best
    others = [each for each in result.predictions if each is not best]
    return replace(result, predictions=(prediction, *others))


def _compared(limited: Prediction, unlimited: Prediction) -> str:
    names = ("tpot_ms", "ttft_ms")
    parts = [f"{name} {limited.metrics[name]:.4g}" for name in names]
    before = [f"{unlimited.metrics[name]:.4g}" for name in names]
    return f"{' and '.join(parts)} in place of {' and '.join(before)}"


def most_within(limit: float, taken: Callable[[int], float], least: int, most: int) -> int:
    """A large number from `least` to `most` that takes at most the limit; else the least.

    What is taken grows with the number, if not evenly (tiles are padded): so halve until it is
    within the limit, and then look between that and its double.
    """
    low, high = most, most
    while low > least and taken(low) > limit:
        low, high = max(low // 2, least), low - 1
    while low < high:
        middle = (low + high + 1) // 2
        if taken(middle) <= limit:
            low = middle
        else:
            high = middle - 1
    return low
