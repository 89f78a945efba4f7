"""How many drafts each decode bucket verifies: the number with the least time for a token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from tokenspeed_plan.planner.advisor.candidate import Candidate
from tokenspeed_plan.planner.advisor.prediction import Predictor
from tokenspeed_plan.planner.advisor.search_space import DEPTHS
from tokenspeed_plan.plans.errors import SpecError

# The share of a token's time that more drafts must save: predictions do not tell depths apart that
# are closer (measured on an H200).
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
        return self.token_us[0] / self.token_us[self.depth]

    def at_most(self, max_depth: int) -> BucketDepth:
        """The same bucket with the best of fewer drafts."""
        allowed = [depth for depth in self.token_us if depth <= max_depth]
        return replace(self, depth=_cheapest(self.token_us, allowed))


def bucket_depths(
    predictor: Predictor, candidate: Candidate, buckets: tuple[int, ...]
) -> tuple[BucketDepth, ...]:
    """The drafts of each bucket: what the spec states, else the fewest near the least time.

    Where the state of the deepest does not fit, no bucket drafts more than the candidate, which
    does fit.

    Raises:
        SpecError: drafts are asked for, and the model has no layer that makes them.
    """
    stated = predictor.spec.stated_depth
    if not predictor.config.num_mtp_layers:
        if stated:
            raise SpecError(
                f"`{predictor.config.name}` has no MTP layer to draft with",
                "set `speculation: off`",
            )
        return tuple(BucketDepth(bucket, {0: 1.0}, 0) for bucket in buckets)
    if stated is not None:
        return tuple(_stated(predictor, candidate, bucket, stated) for bucket in buckets)
    table = tuple(_cheapest_of(predictor, candidate, bucket) for bucket in buckets)
    deepest = replace(candidate, knobs=replace(candidate.knobs, depth=max_depth(table)))
    if predictor.fullest(deepest).total > predictor.hardware.memory_bytes:
        return tuple(each.at_most(candidate.knobs.depth) for each in table)
    return table


def max_depth(table: Iterable[BucketDepth]) -> int:
    """The most drafts of any bucket."""
    return max(each.depth for each in table)


def _stated(predictor: Predictor, candidate: Candidate, bucket: int, depth: int) -> BucketDepth:
    token_us = {tried: predictor.token_us(candidate, bucket, tried) for tried in sorted({0, depth})}
    return BucketDepth(bucket, token_us, depth)


def _cheapest_of(predictor: Predictor, candidate: Candidate, bucket: int) -> BucketDepth:
    token_us = {depth: predictor.token_us(candidate, bucket, depth) for depth in DEPTHS}
    return BucketDepth(bucket, token_us, _cheapest(token_us, DEPTHS))


def _cheapest(token_us: Mapping[int, float], depths: Iterable[int]) -> int:
    """The fewest drafts whose token takes almost as little time as the best."""
    allowed = list(depths)
    limit_us = min(token_us[depth] for depth in allowed) * (1 + WORTH_A_DRAFT)
    return min(depth for depth in allowed if token_us[depth] <= limit_us)
