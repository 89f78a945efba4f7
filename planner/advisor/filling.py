"""Steps in which a prompt ends: how far they are filled with a part of the next prompt.

Who gets a first token waits for all tokens of its step. A step of few tokens reads all weights all
the same, so that others come with it almost for nothing; beyond that they only make it late.
"""

from __future__ import annotations

from tokenspeed_plan.planner.advisor.candidate import Candidate
from tokenspeed_plan.planner.advisor.numbers import most_within
from tokenspeed_plan.planner.advisor.prediction import Predictor
from tokenspeed_plan.planner.ledger import Ledger

MOST_LONGER = 2.0  # a step that is filled takes so many times one of a page at most


def filled_tokens(predictor: Predictor, candidate: Candidate) -> int:
    """Tokens up to which such a step is filled; 0 where it is always filled.

    Nobody waits for the first token of a row of a batch, nor where only one sequence runs.
    """
    workload, knobs = predictor.spec.workload, candidate.knobs
    if workload.is_batch_of_rows or workload.num_seqs <= candidate.replicas:
        return 0

    def step_us(tokens: int) -> float:
        layout = candidate.prefill or candidate.layout
        return predictor.steps.prefill(layout, tokens, 0, knobs.kv_dtype).total_us

    chunk, longest_us = knobs.prefill_chunk, MOST_LONGER * step_us(knobs.page_size)
    # A whole chunk is no limit.
    return most_within(longest_us, step_us, knobs.page_size, chunk) % chunk


def record_filling(ledger: Ledger, tokens: int) -> None:
    """Record it where such steps are not always filled."""
    if tokens:
        ledger.record(
            "filling",
            f"up to {tokens} tokens where a prompt ends",
            "so many take twice the time of a page of them; who gets its first token waits for all",
            "a chunk",
        )
