"""How many drafts each decode bucket verifies: the number with the least time for a token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from tokenspeed_plan.planner.advisor.candidate import Candidate
from tokenspeed_plan.planner.advisor.prediction import Predictor
from tokenspeed_plan.planner.advisor.search_space import DEPTHS

# The share of a token's time that more drafts must save. Below it, predictions do not rank depths
# reliably (measured on an H200).
WORTH_A_DRAFT = 0.05


@dataclass(frozen=True, slots=True)
class BucketDepth:
    """The drafts of one bucket, and its microseconds for a token by the number of drafts."""

    bucket: int
    token_us: Mapping[int, float]
    depth: int

    @property
    def gain(self) -> float:
        """The rate of tokens over that without drafts."""
        plain_us = self.token_us[0]
        return plain_us / self.token_us[self.depth]

    def at_most(self, max_depth: int) -> BucketDepth:
        """The same bucket with the best of fewer drafts."""
        allowed = {}
        for depth, us in self.token_us.items():
            if depth <= max_depth:
                allowed[depth] = us
        return replace(self, depth=_cheapest(allowed))


def bucket_depths(
    predictor: Predictor, candidate: Candidate, buckets: tuple[int, ...]
) -> tuple[BucketDepth, ...]:
    """The drafts of each bucket: what the spec states, else the fewest near the least time.

    Where the state of the most drafts does not fit, no bucket makes more of them than the
    candidate, which fits.
    """
    stated = predictor.spec.stated_depth
    if not predictor.config.num_mtp_layers:
        return tuple(BucketDepth(bucket, {0: 1.0}, 0) for bucket in buckets)
    tried: Iterable[int] = DEPTHS
    if stated is not None:
        tried = sorted({0, stated})
    table = []
    for bucket in buckets:
        token_us = {depth: predictor.token_us(candidate, bucket, depth) for depth in tried}
        table.append(BucketDepth(bucket, token_us, _cheapest(token_us)))
    if stated is not None:
        return tuple(replace(each, depth=stated) for each in table)
    if not _deepest_fits(predictor, candidate, max_depth(table)):
        limit = candidate.knobs.depth
        return tuple(each.at_most(limit) for each in table)
    return tuple(table)


def _deepest_fits(predictor: Predictor, candidate: Candidate, depth: int) -> bool:
    """Whether the candidate fits with so many drafts."""
    knobs = replace(candidate.knobs, depth=depth)
    return predictor.fits(replace(candidate, knobs=knobs))


def max_depth(table: Iterable[BucketDepth]) -> int:
    """The most drafts of any bucket."""
    return max(each.depth for each in table)


def _cheapest(token_us: Mapping[int, float]) -> int:
    """The fewest drafts whose token takes almost as little time as the best."""
    limit_us = min(token_us.values()) * (1 + WORTH_A_DRAFT)
    good = [depth for depth, us in token_us.items() if us <= limit_us]
    return min(good)
