"""Prompts of a batch that wait for each other, so that one prefill step computes many of them.

Where answers vary in length, sequences end one by one, and each new prompt would have a step of its
own that reads all weights. While it waits for others, its sequence is idle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenspeed_plan.planner.advisor.load_judge import Deployment, with_load
from tokenspeed_plan.planner.advisor.prediction import Prediction, Predictor
from tokenspeed_plan.planner.advisor.ranking import SearchResult
from tokenspeed_plan.planner.ledger import Ledger

PARTS = (2, 4, 8, 16)  # of a chunk that are tried
WORTH_WAITING = 0.01  # the share of a batch's time that it must save


@dataclass(frozen=True, slots=True)
class Gathering:
    """For how many tokens prompts wait, 0 for none, with what the workload sees, and the reason."""

    tokens: int
    prediction: Prediction
    reason: str = ""


def gather(
    predictor: Predictor,
    result: SearchResult,
    depths: Mapping[int, int],
    interleaved_tokens: int | None,
) -> Gathering:
    """Let prompts wait where that saves time, and meets the service levels as well.

    Args:
        predictor: of the plan.
        result: whose best is planned, without waiting.
        depths: drafts of a step by decode bucket.
        interleaved_tokens: of prompts between two decode steps; None for a chunk.
    """
    best = result.best
    if best.run is None or best.concurrency == 1:
        return Gathering(0, best)
    candidate = best.candidate
    most = interleaved_tokens or candidate.knobs.prefill_chunk
    tried = []
    for part in PARTS:
        tokens = max(most // part, 1)
        tried.append((tokens, predictor.predict(candidate, depths, interleaved_tokens, tokens)))
    allowed = [each for each in tried if result.excess(each[1]) <= result.excess(best)]
    tokens, found = max(allowed, key=lambda each: each[1].tokens_per_s, default=(0, best))
    gain = found.tokens_per_s / best.tokens_per_s
    if gain < 1.0 + WORTH_WAITING:
        return Gathering(0, best)
    if result.percentiles:
        waiting = Deployment(predictor, candidate, depths, interleaved_tokens, tokens)
        found = with_load(found, waiting)
        if result.excess(found) > result.excess(best):
            return Gathering(0, best)
    return Gathering(tokens, found, f"{gain:.3f} times the tokens of prompts that never wait")


def record_gathering(ledger: Ledger, gathering: Gathering) -> None:
    """Record it where prompts wait."""
    if gathering.tokens:
        value = f"{gathering.tokens} prefill tokens, while all sequences are taken"
        ledger.record("gathering", value, gathering.reason)
