"""How unevenly a router chooses, as the exponent of a Zipf law, from counted choices.

A step reads each expert that any of its tokens chose, once. What has to be right is therefore the
number of distinct experts of T tokens. From N tokens of which n_e chose expert e, a random T of
them hit sum_e 1 - C(N - n_e, T) / C(N, T) experts (rarefaction: Hurlbert, Ecology 1971). It has no
bias however few tokens were counted, where n_e / N by itself would look too uneven.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenspeed_plan.planner.passes.cost import expected_hits
from tokenspeed_plan.plans.routing_file import MAX_SKEW

BATCHES = (2, 4, 8, 16, 32, 64, 128, 256)  # tokens of a step
ROUNDS = 40  # of bisection


@dataclass(frozen=True, slots=True)
class Routing:
    """What was counted: for each layer, how many tokens chose each expert."""

    counts: Sequence[Sequence[int]]
    num_tokens: int
    per_token: int

    @property
    def num_experts(self) -> int:
        """Of a layer."""
        return len(self.counts[0])

    def distinct(self, batch: int) -> float:
        """Experts that so many of the tokens hit, the average of all layers."""
        totals = (
            math.fsum(_hit_share(self.num_tokens, chosen, batch) for chosen in layer)
            for layer in self.counts
        )
        return math.fsum(totals) / len(self.counts)

    @property
    def batches(self) -> list[int]:
        """The batches that tell: with fewer tokens than were counted, not all experts hit."""
        return [
            batch
            for batch in BATCHES
            if 2 * batch <= self.num_tokens
            and self._even(batch) < 0.98 * self.num_experts
            and self._even(batch) > 1.01 * self.per_token
        ]

    def _even(self, batch: int) -> float:
        return expected_hits(self.num_experts, self.per_token, batch)

    @property
    def skew(self) -> float:
        """The exponent with which the batches that tell hit as many experts as they did."""
        found = {batch: self.distinct(batch) for batch in self.batches}
        if not found or self._error(found, 0.0) <= 0:
            return 0.0
        low, high = 0.0, float(MAX_SKEW)
        for _ in range(ROUNDS):
            middle = (low + high) / 2.0
            if self._error(found, middle) > 0:
                low = middle
            else:
                high = middle
        return round((low + high) / 2.0, 3)

    def _error(self, found: Mapping[int, float], skew: float) -> float:
        """By how much a law says more experts than were hit, of each batch's own."""
        return math.fsum(
            expected_hits(self.num_experts, self.per_token, batch, skew) / hits - 1.0
            for batch, hits in found.items()
        )


def _hit_share(num_tokens: int, chosen: int, batch: int) -> float:
    """The share of random batches in which some token chose an expert: 1 - C(N-n, T) / C(N, T)."""
    others = num_tokens - chosen
    if batch > others:
        return 1.0
    log_miss = (
        math.lgamma(others + 1)
        - math.lgamma(others - batch + 1)
        - math.lgamma(num_tokens + 1)
        + math.lgamma(num_tokens - batch + 1)
    )
    return -math.expm1(log_miss)
