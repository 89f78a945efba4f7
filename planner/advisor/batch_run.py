"""A batch from its first row to its last, step by step, as the scheduler runs it.

Rows are admitted while sequences are left. While some prefill and others decode, the two kinds of
step take turns; a prefill step takes tokens of as many prompts as fit a chunk. Between two ends of
sequences all decode steps are alike, and are taken at once. Preemption is left out: pages are
planned so that it is rare.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol


class StepPrices(Protocol):
    """Microseconds of steps, host work that nothing hides included."""

    def prefill_us(self, tokens: int, decoding: int) -> float:
        """Of a prefill step of so many tokens, while others decode."""

    def decode_us(self, num_seqs: int, context_tokens: float) -> float:
        """Of a decode step of so many sequences with this mean context."""

    def tokens(self, num_seqs: int) -> float:
        """That a decode step of so many sequences yields for each of them."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Sequences at once, tokens of a prefill step, and those of one between two decode steps."""

    num_seqs: int
    chunk: int
    interleaved: int


@dataclass(frozen=True, slots=True)
class BatchRun:
    """What a batch took.

    Attributes:
        num_rows: of the batch. input_tokens, output_tokens: of all of them.
        prefill_us, decode_us: of all steps of a kind.
        prefill_steps: how many there were.
        decode_steps: how many there were, by the sequences that decoded.
    """

    num_rows: int
    input_tokens: int
    output_tokens: int
    prefill_us: float
    decode_us: float
    prefill_steps: int
    decode_steps: Mapping[int, int]

    @property
    def total_s(self) -> float:
        """Seconds from the first step to the last."""
        return (self.prefill_us + self.decode_us) * 1e-6

    @property
    def output_tokens_per_s(self) -> float:
        """Tokens of answers in a second."""
        return self.output_tokens / self.total_s

    @property
    def input_tokens_per_s(self) -> float:
        """Tokens of prompts in a second."""
        return self.input_tokens / self.total_s

    @property
    def mean_prefill_tokens(self) -> float:
        """Tokens of a prefill step."""
        return self.input_tokens / self.prefill_steps

    @property
    def mean_batch(self) -> float:
        """Sequences of a decode step."""
        steps = sum(self.decode_steps.values())
        if not steps:
            return 0.0
        return sum(size * count for size, count in self.decode_steps.items()) / steps


def run_batch(
    rows: Iterable[tuple[int, int]], limits: BatchLimits, prices: StepPrices
) -> BatchRun:
    """Run rows, each with the tokens of its prompt and of its answer."""
    return _Pool(deque(rows), limits, prices).run()


@dataclass(slots=True)
class _Prompt:
    """A prompt under way."""

    prompt: int
    output: int
    left: int


@dataclass(slots=True)
class _Pool:
    """The state between two steps.

    `position` counts the tokens that each decoding sequence got since the beginning. A sequence is
    in `ends` by the position of its last token, with its prompt less the position of its first, so
    that the context of all is the sum of these and of a position for each.
    """

    waiting: deque[tuple[int, int]]
    limits: BatchLimits
    prices: StepPrices
    prefilling: deque[_Prompt] = field(default_factory=deque)
    ends: list[tuple[float, float]] = field(default_factory=list)
    position: float = 0.0
    offsets: float = 0.0
    prefill_us: float = 0.0
    decode_us: float = 0.0
    prefill_steps: int = 0
    decode_steps: Counter[int] = field(default_factory=Counter)

    def run(self) -> BatchRun:
        """All steps."""
        num_rows = len(self.waiting)
        inputs = sum(prompt for prompt, _ in self.waiting)
        outputs = sum(output for _, output in self.waiting)
        was_prefill = False
        while self.waiting or self.prefilling or self.ends:
            self._admit()
            was_prefill = bool(self.prefilling) and not (self.ends and was_prefill)
            if was_prefill:
                self._prefill()
            else:
                self._decode()
        return BatchRun(
            num_rows,
            inputs,
            outputs,
            self.prefill_us,
            self.decode_us,
            self.prefill_steps,
            self.decode_steps,
        )

    def _admit(self) -> None:
        free = self.limits.num_seqs - len(self.prefilling) - len(self.ends)
        for _ in range(min(free, len(self.waiting))):
            prompt, output = self.waiting.popleft()
            self.prefilling.append(_Prompt(prompt, output, prompt))

    def _prefill(self) -> None:
        """One step; an answer's first token comes with the end of its prompt."""
        most = self.limits.chunk
        if self.ends:
            most = min(most, self.limits.interleaved)
        room, decoding = most, len(self.ends)
        while room and self.prefilling:
            first = self.prefilling[0]
            taken = min(first.left, room)
            first.left -= taken
            room -= taken
            if not first.left:
                self.prefilling.popleft()
                self._begin(first)
        self.prefill_us += self.prices.prefill_us(most - room, decoding)
        self.prefill_steps += 1

    def _begin(self, row: _Prompt) -> None:
        if row.output > 1:
            offset = row.prompt + 1 - self.position
            heapq.heappush(self.ends, (self.position + row.output - 1, offset))
            self.offsets += offset

    def _decode(self) -> None:
        """Steps until a sequence ends; only one where prompts wait."""
        count = len(self.ends)
        each = self.prices.tokens(count)
        steps = 1
        if not self.prefilling:
            steps = max(math.ceil((self.ends[0][0] - self.position) / each - 1e-9), 1)
        middle = self.position + each * (steps - 1) / 2
        context = self.offsets / count + middle
        self.decode_us += steps * self.prices.decode_us(count, context)
        self.decode_steps[count] += steps
        self.position += steps * each
        while self.ends and self.ends[0][0] <= self.position + 1e-9:
            _, offset = heapq.heappop(self.ends)
            self.offsets -= offset
