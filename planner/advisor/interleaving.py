"""Prefill between decode steps: how many tokens of prompts may come before the next token.

A step of a long chunk keeps everybody else waiting. Where tokens would take longer than the service
level, less of a prompt is computed at once; that makes first tokens later, which is priced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from tokenspeed_plan.planner.advisor.candidate import Knobs
from tokenspeed_plan.planner.advisor.load_judge import Deployment, with_load
from tokenspeed_plan.planner.advisor.numbers import most_within
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
    names = [name for name in result.slo if name.startswith("tpot")]
    if not names:
        return Interleaving(None, best, "a chunk: the spec names no time per token")
    name = max(names, key=lambda each: best.level(each) / result.slo[each])
    allowed_ms, value = result.slo[name], best.level(name)
    if value <= allowed_ms:
        reason = f"a chunk: {name} {value:.4g} is within {allowed_ms:g} without a limit"
        return Interleaving(None, best, reason)
    if best.concurrency == 1:
        return Interleaving(None, best, "a chunk: nobody else waits while a prompt is computed")

    @cache
    def limited(tokens: int) -> Prediction:
        found = predictor.predict(best.candidate, depths, tokens)
        if result.percentiles:
            found = with_load(found, Deployment(predictor, best.candidate, depths, tokens))
        return found

    def ratio(tokens: int) -> float:
        return max(limited(tokens).level(each) / result.slo[each] for each in names)

    knobs = best.candidate.knobs
    tokens = _most_tokens(ratio, knobs, bool(result.percentiles))
    found = limited(tokens)
    compared = _compared(name, found, best)
    if ratio(tokens) > 1.0 or result.excess(found) >= result.excess(best):
        reason = f"a chunk: at most {tokens} tokens would not meet the service levels, {compared}"
        return Interleaving(None, best, reason)
    reason = f"a token within {allowed_ms:g} ms, {compared}"
    if tokens <= knobs.page_size:
        reason += "; warning: one page of a prompt between two decode steps makes its steps many"
    return Interleaving(tokens, found, reason)


def _most_tokens(ratio: Callable[[int], float], knobs: Knobs, is_simulated: bool) -> int:
    """The most tokens with which no time is over its level; of simulated ones powers of two."""
    page, chunk = knobs.page_size, knobs.prefill_chunk
    if not is_simulated:
        return most_within(1.0, ratio, page, chunk)
    doublings = max((chunk // page).bit_length() - 1, 0)
    bits = most_within(1.0, lambda bits: ratio(min(page << bits, chunk)), 0, doublings)
    return min(page << bits, chunk)


def _compared(name: str, limited: Prediction, unlimited: Prediction) -> str:
    names = (name, name.replace("tpot", "ttft"))
    parts = [f"{each} {limited.level(each):.4g}" for each in names]
    before = [f"{unlimited.level(each):.4g}" for each in names]
    return f"{' and '.join(parts)} in place of {' and '.join(before)}"
