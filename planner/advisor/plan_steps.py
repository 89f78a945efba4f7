"""What the steps of a frozen plan take, by the advisor's model of steps, for any batch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

from tokenspeed_plan.planner.advisor.batch_prices import Line, linear
from tokenspeed_plan.planner.advisor.numbers import powers_of_two
from tokenspeed_plan.planner.advisor.step_model import StepModel, host_us
from tokenspeed_plan.planner.layout import ParallelLayout

LEAST_TOKENS = 16  # of a prefill step, below which it takes no less


@dataclass
class PlanSteps:
    """Microseconds of steps; both kinds are linear in the context, between prices at two of them.

    Attributes:
        steps: the model of steps.
        layout: of the plan.
        depths: drafts of each decode program, by bucket.
        is_padded: whether a program computes its whole bucket, however few sequences there are.
        chunk: tokens of the longest prefill step.
        max_context: tokens of the longest sequence.
        kv_dtype: how keys and values are kept.
        decodes, prefills: prices so far.
    """

    steps: StepModel
    layout: ParallelLayout
    depths: dict[int, int]
    is_padded: bool
    chunk: int
    max_context: int
    kv_dtype: str
    decodes: dict[int, Line] = field(default_factory=dict)
    prefills: dict[tuple[int, int], Line] = field(default_factory=dict)

    def on(self, layout: ParallelLayout) -> PlanSteps:
        """The same programs on ranks that share the model in another way."""
        return replace(self, layout=layout, decodes={}, prefills={})

    def decode_us(self, bucket: int, seqs: int, context: float) -> float:
        """A decode step; padding has no context."""
        size = bucket if self.is_padded else seqs
        if size not in self.decodes:
            self.decodes[size] = self._line(
                lambda context: (
                    self.steps.decode(
                        self.layout, size, context, self.depths[bucket], self.kv_dtype
                    ).total_us
                )
            )
        return self.decodes[size].at(context * seqs / size)

    def prefill_us(self, tokens: int, seqs: int, context: float) -> float:
        """A prefill step of prompts that have, on average, so much context before it."""
        sizes = self._sizes
        index = bisect_left(sizes, tokens)
        around = sizes[max(index - 1, 0) : index + 1]
        points = [(size, self._prefill_us(size, seqs, context)) for size in around]
        return linear(points, tokens)

    def host_us(self, seqs: int, prompts: int) -> float:
        """The host before a step."""
        return host_us(self.steps, seqs, prompts)

    @cached_property
    def _sizes(self) -> list[int]:
        """Tokens of prefill steps that are priced."""
        sizes = {*powers_of_two(self.chunk), self.chunk}
        return sorted(size for size in sizes if size >= min(LEAST_TOKENS, self.chunk))

    def _prefill_us(self, size: int, seqs: int, context: float) -> float:
        seqs = min(1 << (seqs.bit_length() - 1), size)  # many have the price of a few less
        key = (size, seqs)
        if key not in self.prefills:
            self.prefills[key] = self._line(
                lambda context: (
                    self.steps.prefill(
                        self.layout, size, context, self.kv_dtype, max(self.depths.values()), seqs
                    ).total_us
                )
            )
        return self.prefills[key].at(context)

    def _line(self, price: Callable[[int], float]) -> Line:
        """The line through the prices at a short and at a long context."""
        return Line.through(price, 1, max(self.max_context // 2, 2))
