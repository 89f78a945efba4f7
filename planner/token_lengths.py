"""Lengths of prompts and answers: one for all rows, or spread out around a mean."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist, fmean

_NORMAL = NormalDist()
_Z95 = _NORMAL.inv_cdf(0.95)
_POINTS = 256  # quantiles that stand for the distribution
_ROUNDS = 8  # after which what is cut off at the longest has the mean again


@dataclass(frozen=True, slots=True)
class Lengths:
    """A log-normal distribution of tokens, cut off at the longest.

    It has this mean and this 95th percentile. With mu and s of the logarithm, ln mean = mu + s^2/2
    and ln p95 = mu + 1.645 s (Johnson, Kotz, Balakrishnan: Continuous Univariate Distributions,
    chapter 14), of which s is the smaller solution.
    """

    mean: float
    p95: float
    longest: int

    @classmethod
    def all_alike(cls, tokens: int) -> Lengths:
        """Every row has this many tokens."""
        return cls(tokens, tokens, tokens)

    @classmethod
    def of(cls, tokens: Sequence[int]) -> Lengths:
        """The summary of measured lengths, at least one."""
        ordered = sorted(tokens)
        p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
        return cls(round(fmean(ordered), 1), p95, ordered[-1])

    @property
    def varies(self) -> bool:
        """Whether there is more than one length."""
        return self.longest > self.mean

    @property
    def log_spread(self) -> float:
        """The standard deviation of the logarithm; 0 where the 95th percentile is no tail."""
        ratio = math.log(max(self.p95 / self.mean, 1.0))
        return _Z95 - math.sqrt(max(_Z95 * _Z95 - 2.0 * ratio, 0.0))

    def quantiles(self, count: int) -> list[int]:
        """So many lengths in rising order that are spread as the distribution is."""
        if not self.varies:
            return [self.longest] * count
        spread = self.log_spread
        shares = ((index + 0.5) / count for index in range(count))
        raw = [math.exp(spread * _NORMAL.inv_cdf(share)) for share in shares]
        scale = 1.0
        for _ in range(_ROUNDS):
            cut = [min(max(value * scale, 1.0), self.longest) for value in raw]
            scale *= self.mean / fmean(cut)
        return [min(max(round(value * scale), 1), self.longest) for value in raw]

    def sample(self, count: int, seed: int) -> list[int]:
        """The quantiles in an order that depends on the seed alone."""
        lengths = self.quantiles(count)
        random.Random(seed).shuffle(lengths)
        return lengths

    @property
    def variance(self) -> float:
        """Square tokens by which lengths spread."""
        if not self.varies:
            return 0.0
        return fmean((value - self.mean) ** 2 for value in self.quantiles(_POINTS))


@cache
def rows_of(prompts: Lengths, outputs: Lengths, count: int) -> tuple[tuple[int, int], ...]:
    """Rows of a batch, each with the tokens of its prompt and of its answer."""
    return tuple(zip(prompts.sample(count, 0), outputs.sample(count, 1), strict=True))
