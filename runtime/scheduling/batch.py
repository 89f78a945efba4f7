"""A batch: the sequences of one step, and the program that computes it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tokenspeed_plan.plans.schema import Limits, Plan, Program
from tokenspeed_plan.plans.types import Phase
from tokenspeed_plan.runtime.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """One step; `counts` are the tokens of each sequence to compute, drafts included.

    The place of a sequence is its row in the inputs. In a decode step it keeps the row that it had
    in the step before, where it can: the device has made the inputs of that row already.
    """

    program: Program
    sequences: tuple[Sequence, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, program: Program, sequences: Iterable[Sequence], counts: Iterable[int]) -> Batch:
        """A step of some sequences."""
        return cls(program, tuple(sequences), tuple(counts))

    @property
    def num_tokens(self) -> int:
        """Tokens of its sequences, drafts included, without padding."""
        return sum(self.counts)

    def makes_token(self, index: int) -> bool:
        """Whether it samples for a sequence, before it is committed: in a prompt it does not."""
        return self.sequences[index].num_left <= self.counts[index]

    @property
    def must_be_read(self) -> bool:
        """Whether the host must know its tokens before it can write the inputs of the next step."""
        return any(sequence.must_be_read for sequence in self.sequences)

    def drafts_of(self, index: int) -> list[int]:
        """The drafts of a sequence that a decode step verifies; a missing one is token 0."""
        sequence, count = self.sequences[index], self.program.query_len - 1
        return (sequence.drafts + [0] * count)[:count]

    @property
    def run_tokens(self) -> int:
        """Tokens that the program computes: with padding, where it is captured."""
        if self.program.captured:
            return self.program.max_tokens
        return self.num_tokens

    @property
    def run_seqs(self) -> int:
        """Sequences that the program computes: with padding, where it is captured."""
        if self.program.captured:
            return self.program.max_seqs
        return len(self.sequences)

    @property
    def has_no_output(self) -> bool:
        """Whether the host needs nothing, before anything is committed."""
        return all(self.stays_inside(index) for index in range(len(self.sequences)))

    def stays_inside(self, index: int) -> bool:
        """Whether a sequence stays inside its prompt, unscored: the host needs nothing of it."""
        if self.program.phase != "prefill":
            return False
        sequence = self.sequences[index]
        return self.counts[index] + 1 < sequence.num_left and not sequence.is_scored


class BatchMaker:
    """Cuts prompts into chunks, and finds the smallest program for a batch.

    Prefill steps alternate: one serves the oldest prompt first, so that none starves; the next one
    the prompt with the fewest tokens left, so that short prompts do not wait for long ones.
    """

    def __init__(self, plan: Plan) -> None:
        self._limits: Limits = plan.pool.limits
        self._prefill = _programs(plan, "prefill")
        self._decode = _programs(plan, "decode")
        self._oldest_first = False
        self._members: list[Sequence] = []  # of the last decode step
        self._rows: tuple[Sequence, ...] = ()  # the same, in their rows

    def prefill(self, sequences: list[Sequence], max_tokens: int) -> Batch:
        """Chunks of prompts, at most `max_tokens` in all.

        A part of a prompt makes no step long in which another one ends.
        """
        self._oldest_first = not self._oldest_first
        chosen: list[Sequence] = []
        counts: list[int] = []
        num_left, num_beside = max_tokens, max_tokens
        for sequence in sorted(sequences, key=self._priority):
            room = num_left
            if sequence.num_left > room:
                room = min(room, num_beside)
            if room <= 0:
                continue
            end = sequence.chunk_end(room, self._limits.checkpoint_interval)
            count = end - sequence.num_computed
            chosen.append(sequence)
            counts.append(count)
            num_left -= count
            num_beside -= count
            if count == sequence.num_left and self._limits.filled_tokens:
                num_beside = min(num_beside, self._limits.filled_tokens - max_tokens + num_left)
            if num_left == 0:
                break
        program = _smallest(self._prefill, sum(counts), len(counts))
        return Batch.of(program, chosen, counts)

    def decode_program(self, num_seqs: int) -> Program:
        """The program of a decode step of so many sequences."""
        return _smallest(self._decode, num_seqs, num_seqs)

    def decode(self, sequences: list[Sequence]) -> Batch:
        """One step of every sequence.

        The tuple of its sequences stays the same object while they are the same.
        """
        program = self.decode_program(len(sequences))
        if sequences != self._members:
            self._rows = keep_rows(self._rows, sequences)
            self._members = sequences
        return Batch(program, self._rows, (program.query_len,) * len(sequences))

    def _priority(self, sequence: Sequence) -> tuple[int, int]:
        """The smallest is served first; numbers are in order of arrival."""
        if self._oldest_first:
            return 0, sequence.number
        return sequence.num_left, sequence.number


def keep_rows(before: tuple[Sequence, ...], now: list[Sequence]) -> tuple[Sequence, ...]:
    """The sequences of `now`, each in the row that it has in `before`, where there is that row.

    The others fill the gaps, so that a batch has no padding between its sequences.
    """
    members = set(now)
    rows: list[Sequence | None] = [None] * len(now)
    for row, sequence in enumerate(before[: len(now)]):
        if sequence in members:
            rows[row] = sequence
            members.remove(sequence)
    others = iter([sequence for sequence in now if sequence in members])
    return tuple(sequence or next(others) for sequence in rows)


def _programs(plan: Plan, phase: Phase) -> list[Program]:
    """The programs of a phase, the smallest first."""
    programs = [program for program in plan.pool.programs if program.phase == phase]
    return sorted(programs, key=lambda program: program.bucket)


def _smallest(programs: list[Program], num_tokens: int, num_seqs: int) -> Program:
    """The first program that is large enough."""
    for program in programs:
        if program.max_tokens >= num_tokens and program.max_seqs >= num_seqs:
            return program
    raise AssertionError(f"no program takes {num_tokens} tokens of {num_seqs} sequences")
