"""What the steps of a batch cost: the model of steps at a few sizes, and the host beside it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tokenspeed_plan.planner.advisor.numbers import powers_of_two

LEAST_CHUNK = 16  # tokens, below which a prefill step takes no less


@dataclass(frozen=True, slots=True)
class PriceSource:
    """How steps of one deployment are priced.

    Attributes:
        prefill_us: of so many tokens.
        decode_us: of a bucket of sequences with so many tokens of context each.
        tokens: that a step of a bucket yields for each sequence.
        host_us: of the host for each sequence of a step that was not launched ahead.
        page_size: tokens after which a sequence needs another page.
        contexts: two contexts, between which the price of a step is linear.
    """

    prefill_us: Callable[[int], float]
    decode_us: Callable[[int, int], float]
    tokens: Callable[[int], float]
    host_us: float
    page_size: int
    contexts: tuple[int, int]


@dataclass(slots=True)
class BatchPrices:
    """Prices for a run of a batch.

    Attributes:
        source: of the prices.
        buckets: sizes of decode programs, rising; a smaller batch is padded to the next one.
        is_padded: whether programs run at their full size; without it, prices are linear between
            buckets.
        chunk: the largest prefill step, in tokens.
        known: prices of decode steps at both contexts, by bucket.
    """

    source: PriceSource
    buckets: Sequence[int]
    is_padded: bool
    chunk: int
    known: dict[int, tuple[float, float]] = field(default_factory=dict)
    prefills: list[tuple[int, float]] = field(default_factory=list)

    def tokens(self, num_seqs: int) -> float:
        """Tokens that a decode step yields for each sequence."""
        return self.source.tokens(self._bucket(num_seqs))

    def prefill_us(self, tokens: int, decoding: int) -> float:
        """Microseconds of a prefill step; linear between powers of two."""
        if not self.prefills:
            sizes = [size for size in powers_of_two(self.chunk) if size >= LEAST_CHUNK]
            sizes = sorted({*sizes, self.chunk})
            self.prefills = [(size, self.source.prefill_us(size)) for size in sizes]
        return linear(self.prefills, tokens) + self.source.host_us * (decoding + 1)

    def decode_us(self, num_seqs: int, context_tokens: float) -> float:
        """Microseconds of a decode step.

        A step is not launched ahead where a sequence crosses a page, of n sequences with the chance
        1 - (1 - 1/page)^n; the host's work is in the open then.
        """
        bucket = self._bucket(num_seqs)
        crossed = self.source.tokens(bucket) / self.source.page_size
        waits = 1.0 - (1.0 - min(crossed, 1.0)) ** num_seqs
        host_us = waits * num_seqs * self.source.host_us
        if self.is_padded:
            return self._at(bucket, context_tokens * num_seqs / bucket) + host_us
        index = bisect_left(self.buckets, num_seqs)
        around = self.buckets[max(index - 1, 0) : index + 1]
        prices = [(size, self._at(size, context_tokens)) for size in around]
        return linear(prices, num_seqs) + host_us

    def _bucket(self, num_seqs: int) -> int:
        """The smallest one that holds them."""
        return self.buckets[min(bisect_left(self.buckets, num_seqs), len(self.buckets) - 1)]

    def _at(self, bucket: int, context_tokens: float) -> float:
        few, many = self.source.contexts
        if bucket not in self.known:
            at = self.source.decode_us
            self.known[bucket] = (at(bucket, few), at(bucket, many))
        few_us, many_us = self.known[bucket]
        share = (context_tokens - few) / (many - few)
        return max(few_us + share * (many_us - few_us), 0.0)


def linear(points: Sequence[tuple[int, float]], size: int) -> float:
    """The price at a size between those of the points around it; that of the ends outside."""
    index = bisect_left(points, size, key=lambda point: point[0])
    if index == 0:
        return points[0][1]
    if index == len(points):
        return points[-1][1]
    (below, below_us), (above, above_us) = points[index - 1], points[index]
    return below_us + (size - below) / (above - below) * (above_us - below_us)
