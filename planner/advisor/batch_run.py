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

from tokenspeed_plan.planner.advisor.numbers import digits


class StepPrices(Protocol):
    """Microseconds of steps, and of the host where nothing hides it."""

    def prefill_us(self, tokens: int) -> float:
        """Of a prefill step of so many tokens."""

    def prefill_host_us(self, tokens: int, num_seqs: int) -> float:
        """Of the host for a prefill step, with so many sequences at once."""

    def decode_us(self, num_seqs: int, context_tokens: float) -> float:
        """Of a decode step of so many sequences with this mean context."""

    def decode_host_us(self, num_seqs: int) -> float:
        """Of the host for a decode step."""

    def tokens(self, num_seqs: int) -> float:
        """That a decode step of so many sequences yields for each of them."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Sequences at once, tokens of a prefill step, and those of one between two decode steps.

    `gathered`: tokens for which prompts wait while all sequences are taken and some decode.
    `shared`: tokens with which every prompt begins, computed once: the others wait for the first.
    """

    num_seqs: int
    chunk: int
    interleaved: int
    gathered: int = 0
    shared: int = 0


@dataclass(frozen=True, slots=True)
class BatchRun:
    """What a batch took.

    Attributes:
        num_rows: of the batch. input_tokens, output_tokens: of all of them.
        computed_tokens: of prompts; what they share is computed once.
        prefill_us, decode_us: of all steps of a kind. host_us: in which nothing else was done.
        prefill_steps: how many there were.
        decode_steps: how many there were, by the sequences that decoded.
    """

    num_rows: int
    input_tokens: int
    output_tokens: int
    computed_tokens: int
    prefill_us: float
    decode_us: float
    host_us: float
    prefill_steps: int
    decode_steps: Mapping[int, int]

    @property
    def total_s(self) -> float:
        """Seconds from the first step to the last."""
        return (self.prefill_us + self.decode_us + self.host_us) * 1e-6

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
        return self.computed_tokens / self.prefill_steps

    @property
    def mean_batch(self) -> float:
        """Sequences of a decode step."""
        steps = sum(self.decode_steps.values())
        if not steps:
            return 0.0
        return sum(size * count for size, count in self.decode_steps.items()) / steps

    def as_json(self) -> dict[str, float]:
        """Rates, where the seconds went, and how many steps there were, rounded."""
        return {
            "rows": self.num_rows,
            "input_tokens_per_s": digits(self.input_tokens_per_s),
            "output_tokens_per_s": digits(self.output_tokens_per_s),
            "total_s": digits(self.total_s),
            "prefill_s": digits(self.prefill_us * 1e-6),
            "decode_s": digits(self.decode_us * 1e-6),
            "host_s": digits(self.host_us * 1e-6),
            "prefill_steps": self.prefill_steps,
            "decode_steps": sum(self.decode_steps.values()),
            "mean_batch": digits(self.mean_batch),
        }


def run_batch(rows: Iterable[tuple[int, int]], limits: BatchLimits, prices: StepPrices) -> BatchRun:
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

    `position` counts the tokens that each decoding sequence got since the beginning. Sequences that
    began together are in `ends` by the position of their last token, with their prompt less the
    position of their first, and their number. So the context of all is the sum of these, and of a
    position for each.
    """

    waiting: deque[tuple[int, int]]
    limits: BatchLimits
    prices: StepPrices
    prefilling: deque[_Prompt] = field(default_factory=deque)
    ends: list[tuple[float, float, int]] = field(default_factory=list)
    pending: int = 0  # tokens of prompts under way
    decoding: int = 0
    position: float = 0.0
    offsets: float = 0.0
    prefill_us: float = 0.0
    decode_us: float = 0.0
    host_us: float = 0.0
    prefill_steps: int = 0
    decode_steps: Counter[int] = field(default_factory=Counter)
    cached: int = 0  # tokens with which prompts begin and which are computed
    computed: int = 0  # tokens of prompts

    def run(self) -> BatchRun:
        """All steps."""
        num_rows = len(self.waiting)
        inputs = sum(prompt for prompt, _ in self.waiting)
        outputs = sum(output for _, output in self.waiting)
        was_prefill = False
        while self.waiting or self.prefilling or self.ends:
            if self.waiting:
                self._admit()
            comes_later = was_prefill or self._gathers()
            was_prefill = bool(self.prefilling) and not (self.ends and comes_later)
            if was_prefill:
                self._prefill()
            else:
                self._decode()
        return BatchRun(
            num_rows,
            inputs,
            outputs,
            self.computed,
            self.prefill_us,
            self.decode_us,
            self.host_us,
            self.prefill_steps,
            self.decode_steps,
        )

    def _gathers(self) -> bool:
        """Whether prompts wait for others."""
        if self.decoding + len(self.prefilling) < self.limits.num_seqs:
            return False
        return self.pending < self.limits.gathered

    def _admit(self) -> None:
        free = self.limits.num_seqs - len(self.prefilling) - self.decoding
        if self.cached < self.limits.shared:
            free = min(free, 1 - len(self.prefilling))
        for _ in range(min(free, len(self.waiting))):
            prompt, output = self.waiting.popleft()
            left = prompt - self.cached
            self.prefilling.append(_Prompt(prompt, output, left))
            self.pending += left

    def _prefill(self) -> None:
        """One step; an answer's first token comes with the end of its prompt."""
        most = self.limits.chunk
        if self.ends:
            most = min(most, self.limits.interleaved)
        unknown = self.limits.shared - self.cached
        if unknown:
            most = min(most, unknown)
        room, at_once = most, self.decoding + len(self.prefilling)
        begun: Counter[tuple[int, int]] = Counter()
        while room and self.prefilling:
            first = self.prefilling[0]
            taken = min(first.left, room)
            first.left -= taken
            self.pending -= taken
            room -= taken
            if not first.left:
                self.prefilling.popleft()
                begun[first.prompt, first.output] += 1
        self.cached += min(most - room, unknown)
        for (prompt, output), count in begun.items():
            self._begin(prompt, output, count)
        self.computed += most - room
        self.prefill_us += self.prices.prefill_us(most - room)
        self.host_us += self.prices.prefill_host_us(most - room, at_once)
        self.prefill_steps += 1

    def _begin(self, prompt: int, output: int, count: int) -> None:
        if output > 1:
            offset = prompt + 1 - self.position
            heapq.heappush(self.ends, (self.position + output - 1, offset, count))
            self.offsets += count * offset
            self.decoding += count

    def _decode(self) -> None:
        """Steps until a sequence ends; only one where prompts wait."""
        count = self.decoding
        each = self.prices.tokens(count)
        steps = 1
        if not self.prefilling or self._gathers():
            steps = max(math.ceil((self.ends[0][0] - self.position) / each - 1e-9), 1)
        middle = self.position + each * (steps - 1) / 2
        context = self.offsets / count + middle
        self.decode_us += steps * self.prices.decode_us(count, context)
        self.host_us += steps * self.prices.decode_host_us(count)
        self.decode_steps[count] += steps
        self.position += steps * each
        while self.ends and self.ends[0][0] <= self.position + 1e-9:
            _, offset, ended = heapq.heappop(self.ends)
            self.offsets -= ended * offset
            self.decoding -= ended
