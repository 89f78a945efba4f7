"""What the steps of a batch cost: the model of steps at a few sizes, and the host beside it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from statistics import fmean

from tokenspeed_plan.planner.advisor.batch_run import BatchLimits, BatchRun, run_batch
from tokenspeed_plan.planner.advisor.candidate import Knobs
from tokenspeed_plan.planner.advisor.numbers import powers_of_two
from tokenspeed_plan.planner.advisor.step_model import StepModel, host_us
from tokenspeed_plan.planner.advisor.step_time import StepTime
from tokenspeed_plan.planner.layout import ParallelLayout

LEAST_CHUNK = 16  # tokens, below which a prefill step takes no less
Points = list[tuple[int, float]]  # sizes and their microseconds


@dataclass(frozen=True, slots=True)
class RowShape:
    """Mean tokens of the prompts and of the answers of some rows; prompts share the first."""

    prompt: float
    output: float
    shared: int = 0

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int]], shared: int = 0) -> RowShape:
        """The means of rows, at least one."""
        prompt, output = (fmean(column) for column in zip(*rows, strict=True))
        return cls(prompt, output, shared)


@dataclass(frozen=True, slots=True)
class BatchModel:
    """How a batch runs on one replica of a deployment.

    Attributes:
        steps: the time of steps.
        layout, knobs: of the deployment.
        depth: drafts of a step of so many sequences.
        accepted: tokens that a step with so many drafts yields for each sequence.
        buckets: sizes of decode programs, rising.
        is_padded: whether a smaller batch takes the time of the next larger program; without it,
            times are linear between buckets.
    """

    steps: StepModel
    layout: ParallelLayout
    knobs: Knobs
    depth: Callable[[int], int]
    accepted: Callable[[int], float]
    buckets: Sequence[int]
    is_padded: bool

    def run(
        self,
        rows: Sequence[tuple[int, int]],
        num_seqs: int,
        interleaved: int | None = None,
        gathered: int = 0,
        shared: int = 0,
    ) -> BatchRun:
        """Run rows, at most `num_seqs` at once.

        Args:
            rows: each with the tokens of its prompt and of its answer.
            num_seqs: at once.
            interleaved: tokens of prompts between two decode steps; None for a chunk.
            gathered: tokens for which prompts wait while all sequences are taken.
            shared: tokens with which all prompts begin, fewer than any of them has.
        """
        chunk = self.knobs.prefill_chunk
        interleaved = min(interleaved or chunk, chunk)
        limits = BatchLimits(num_seqs, chunk, interleaved, gathered, shared)
        return run_batch(rows, limits, BatchPrices(self, RowShape.of(rows, shared)))

    def prefill(self, shape: RowShape, tokens: int) -> StepTime:
        """A prefill step of so many tokens, which rows of the mean length share.

        A prompt that is longer than a chunk is in its middle.
        """
        own = shape.prompt - shape.shared
        seqs = min(max(round(tokens / own), 1), tokens)
        before = shape.shared + max(round(own) - self.knobs.prefill_chunk, 0) // 2
        return self.steps.prefill(self.layout, tokens, before, self.knobs.kv_dtype, seqs=seqs)

    def decode_us(self, bucket: int, context: int) -> float:
        """Microseconds of a full decode step."""
        depth, kv_dtype = self.depth(bucket), self.knobs.kv_dtype
        return self.steps.decode(self.layout, bucket, context, depth, kv_dtype).total_us

    def bucket(self, num_seqs: int) -> int:
        """The smallest one that holds so many sequences."""
        return self.buckets[min(bisect_left(self.buckets, num_seqs), len(self.buckets) - 1)]


@dataclass
class BatchPrices:
    """Prices for one run.

    Attributes:
        known: prices of full decode steps, by bucket.
        sizes: prices of decode steps by their sequences.
    """

    model: BatchModel
    shape: RowShape
    known: dict[int, Line] = field(default_factory=dict)
    sizes: dict[int, _Size] = field(default_factory=dict)

    def tokens(self, num_seqs: int) -> float:
        """Tokens that a decode step yields for each sequence."""
        return self._size(num_seqs).tokens

    def prefill_us(self, tokens: int) -> float:
        """Microseconds of a prefill step. Data-parallel groups have prompts of their own."""
        return linear(self._prefills, tokens) / self.model.layout.attention_dp

    def prefill_host_us(self, tokens: int, num_seqs: int) -> float:
        """Microseconds by which the host takes longer than a prefill step."""
        prompts = tokens / max(self.shape.prompt - self.shape.shared, 1.0)
        work_us = host_us(self.model.steps, num_seqs, prompts)
        return max(work_us - self.prefill_us(tokens), 0.0)

    @cached_property
    def _prefills(self) -> Points:
        chunk = self.model.knobs.prefill_chunk
        sizes = sorted({min(LEAST_CHUNK, chunk), *powers_of_two(chunk), chunk})
        large = [size for size in sizes if size >= LEAST_CHUNK or size == chunk]
        return [(size, self.model.prefill(self.shape, size).total_us) for size in large]

    def decode_us(self, num_seqs: int, context_tokens: float) -> float:
        """Microseconds of a decode step."""
        return self._size(num_seqs).price.at(context_tokens)

    def decode_host_us(self, num_seqs: int) -> float:
        """Microseconds by which the host takes longer than a decode step."""
        return self._size(num_seqs).host_us

    def _size(self, num_seqs: int) -> _Size:
        if num_seqs not in self.sizes:
            self.sizes[num_seqs] = self._priced(num_seqs)
        return self.sizes[num_seqs]

    def _priced(self, num_seqs: int) -> _Size:
        """What a decode step of so many sequences costs; the host works while the GPU does."""
        model = self.model
        bucket = model.bucket(num_seqs)
        tokens = model.accepted(model.depth(bucket))
        if model.is_padded:
            around, padding = [bucket], num_seqs / bucket
        else:
            index = bisect_left(model.buckets, num_seqs)
            around, padding = list(model.buckets[max(index - 1, 0) : index + 1]), 1.0
        full = [(size, self._full(size)) for size in around]
        at_none_us = linear([(size, line.at_none_us) for size, line in full], num_seqs)
        slope_us = linear([(size, line.us_per_token) for size, line in full], num_seqs)
        _, many = self._contexts
        work_us = host_us(model.steps, num_seqs)
        in_the_open_us = max(work_us - (at_none_us + slope_us * many), 0.0)
        return _Size(tokens, in_the_open_us, Line(at_none_us, slope_us * padding))

    @property
    def _contexts(self) -> tuple[int, int]:
        """Two contexts, through whose prices a line is drawn: of a beginning, and of a middle."""
        few = round(self.shape.prompt)
        return few, max(round(self.shape.prompt + self.shape.output / 2), few + 1)

    def _full(self, bucket: int) -> Line:
        """The price of a full step, by its context."""
        if bucket not in self.known:
            self.known[bucket] = Line.through(
                partial(self.model.decode_us, bucket), *self._contexts
            )
        return self.known[bucket]


@dataclass(frozen=True, slots=True)
class Line:
    """Microseconds of a step by the context of its sequences, in tokens."""

    at_none_us: float
    us_per_token: float

    @classmethod
    def through(cls, price: Callable[[int], float], few: int, many: int) -> Line:
        """The line through the prices at two contexts."""
        few_us = price(few)
        us_per_token = (price(many) - few_us) / (many - few)
        return cls(few_us - us_per_token * few, us_per_token)

    def at(self, context_tokens: float) -> float:
        """The price at a context."""
        return max(self.at_none_us + self.us_per_token * context_tokens, 0.0)


@dataclass(frozen=True, slots=True)
class _Size:
    """A decode step of some sequences: the tokens of each, the host in the open, and its price."""

    tokens: float
    host_us: float
    price: Line


def linear(points: Sequence[tuple[int, float]], size: int) -> float:
    """The price at a size between those of the points around it; that of the ends outside."""
    index = bisect_left(points, size, key=lambda point: point[0])
    if index == 0:
        return points[0][1]
    if index == len(points):
        return points[-1][1]
    (below, below_us), (above, above_us) = points[index - 1], points[index]
    return below_us + (size - below) / (above - below) * (above_us - below_us)
