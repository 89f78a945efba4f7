"""Continuous batching: who runs in the next step, and with which program.

A request is admitted when a slot and the pages for its longest outcome are free, so that nothing that runs can run out
of memory. Prompts are computed in chunks; while some sequences prefill and others decode, the two kinds of step take
turns.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from tokenspeed_plan.plans.schema import Plan, Program
from tokenspeed_plan.plans.types import Phase
from tokenspeed_plan.runtime.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: for each sequence, how many of its tokens to compute."""

    program: Program
    sequences: tuple[Sequence, ...]
    counts: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of its sequences."""
        return sum(self.counts)

    @property
    def run_tokens(self) -> int:
        """Tokens that the program runs on: with padding, where it is captured."""
        return self.program.max_tokens if self.program.captured else self.num_tokens

    @property
    def run_seqs(self) -> int:
        """Sequences that the program runs on."""
        return self.program.max_seqs if self.program.captured else len(self.sequences)

    def follows(self, other: Batch | None) -> bool:
        """Whether it is the decode step right after another one, whose program has prepared all inputs already."""
        return (
            other is not None
            and self.program is other.program
            and self.program.phase == "decode"
            and len(self.sequences) == len(other.sequences)
            and all(mine is its for mine, its in zip(self.sequences, other.sequences, strict=True))
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """What is taken: requests that wait and run, slots and pages that are not free."""

    waiting: int
    running: int
    slots: int
    pages: int


class Scheduler:
    """Queues, slots and pages."""

    def __init__(self, plan: Plan, chunk: int | None = None) -> None:
        self.limits = plan.limits
        self.chunk = min(chunk or plan.limits.max_tokens, plan.limits.max_tokens)
        self._programs = {
            phase: sorted((p for p in plan.programs if p.phase == phase), key=lambda p: p.bucket)
            for phase in ("prefill", "decode")
        }
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._free_pages = list(range(plan.limits.num_pages - 1, -1, -1))
        self._free_slots = list(range(plan.limits.max_seqs - 1, -1, -1))
        self._last: Phase = "decode"

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._waiting) + len(self._running)

    @property
    def usage(self) -> Usage:
        """What is taken now; another thread may ask too."""
        slots = self.limits.max_seqs - len(self._free_slots)
        return Usage(len(self._waiting), len(self._running), slots, self.limits.num_pages - len(self._free_pages))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._waiting.append(sequence)

    def schedule(self) -> Batch | None:
        """The next step, None when there is nothing to do."""
        self._admit()
        prefilling = [s for s in self._running if s.is_prefilling]
        decoding = [s for s in self._running if not s.is_prefilling]
        if not self._running:
            return None
        self._last = "prefill" if prefilling and (self._last == "decode" or not decoding) else "decode"
        return (
            self._prefill(prefilling)
            if self._last == "prefill"
            else self._batch("decode", decoding, [1] * len(decoding))
        )

    def again(self, batch: Batch) -> Batch | None:
        """The same decode step once more, before its tokens are known; None where something else may come first.

        A sequence may turn out to have ended: then its part of the step is for nothing, and harms nobody.
        """
        goes_on = (
            batch.program.captured
            and not self._waiting
            and len(batch.sequences) == len(self._running)
            and all(s.finish_reason is None and len(s.token_ids) + 2 <= s.longest for s in batch.sequences)
            and all(s.request.params.num_logprobs is None for s in batch.sequences)
        )
        return batch if goes_on else None

    def finish(self, sequence: Sequence) -> None:
        """Give back what a sequence held."""
        self._running.remove(sequence)
        self._free_pages += sequence.pages
        self._free_slots.append(sequence.rows.start // self.limits.rows_per_slot)

    def cancel(self, sequence: Sequence) -> None:
        """Forget a sequence that waits or runs.

        A replay in flight may still write to its pages and rows: it does so before any replay of who gets them next.
        """
        if sequence.pages:
            self.finish(sequence)
        else:
            self._waiting.remove(sequence)

    def _admit(self) -> None:
        while self._waiting and self._free_slots:
            sequence = self._waiting[0]
            needed = -(-sequence.longest // self.limits.page_size)
            if needed > len(self._free_pages):
                return
            self._waiting.popleft()
            sequence.pages = [self._free_pages.pop() for _ in range(needed)]
            sequence.rows = self._rows(self._free_slots.pop())
            self._running.append(sequence)

    def _rows(self, slot: int) -> range:
        """The rows of recurrent state of a slot; row 0 is the zero row and belongs to nobody."""
        start = 1 + slot * self.limits.rows_per_slot
        return range(start, start + self.limits.rows_per_slot)

    def _prefill(self, prefilling: list[Sequence]) -> Batch:
        room, counts = self.chunk, []
        for sequence in prefilling:
            counts.append(min(room, sequence.num_prompt_tokens - sequence.num_computed))
            room -= counts[-1]
            if room == 0:
                break
        return self._batch("prefill", prefilling[: len(counts)], counts)

    def _batch(self, phase: Phase, sequences: list[Sequence], counts: list[int]) -> Batch:
        """The smallest program that is large enough."""
        tokens = sum(counts)
        program = next(p for p in self._programs[phase] if p.max_tokens >= tokens and p.max_seqs >= len(sequences))
        return Batch(program, tuple(sequences), tuple(counts))
