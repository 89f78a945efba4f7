"""A batch: the sequences of one step, the program that computes it, and its state slots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tokenspeed_plan.plans.schema import Limits, Plan, Program
from tokenspeed_plan.plans.types import Phase
from tokenspeed_plan.runtime.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """One step.

    `counts` are the tokens of each sequence to compute, drafts included. A batch that is launched
    ahead, before its predecessor is committed, does not know its state slots; the device does.
    """

    program: Program
    sequences: tuple[Sequence, ...]
    counts: tuple[int, ...]
    src_state_slots: tuple[int, ...]
    dst_state_slots: tuple[tuple[int, ...], ...]
    pages_versions: tuple[int, ...]

    @classmethod
    def of(cls, program: Program, sequences: Iterable[Sequence], counts: Iterable[int]) -> Batch:
        """The next step of some sequences, with the memory that they hold now."""
        members = tuple(sequences)
        return cls(
            program=program,
            sequences=members,
            counts=tuple(counts),
            src_state_slots=tuple(member.state_slot for member in members),
            dst_state_slots=tuple(tuple(member.own_slots) for member in members),
            pages_versions=tuple(member.pages_version for member in members),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of its sequences, drafts included, without padding."""
        return sum(self.counts)

    def makes_token(self, index: int) -> bool:
        """Whether it samples for a sequence, before it is committed: in a prompt it does not."""
        return self.sequences[index].num_left <= self.counts[index]

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
        """Whether the host needs no tokens or drafts: every sequence stays inside its prompt."""
        if self.program.phase != "prefill":
            return False
        for sequence, count in zip(self.sequences, self.counts, strict=True):
            if count + 1 >= sequence.num_left:
                return False
        return True

    def follows(self, other: Batch | None) -> bool:
        """Whether it is the decode step right after `other`, which has made all its inputs."""
        return (
            other is not None
            and self.program is other.program
            and self.program.phase == "decode"
            and self.sequences == other.sequences
            and self.pages_versions == other.pages_versions
        )


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

    def prefill(self, sequences: list[Sequence], max_tokens: int) -> Batch:
        """Chunks of prompts, at most `max_tokens` in all."""
        self._oldest_first = not self._oldest_first
        counts: list[int] = []
        order = sorted(sequences, key=self._priority)
        num_left = max_tokens
        for sequence in order:
            end = sequence.chunk_end(num_left, self._limits.checkpoint_interval)
            count = end - sequence.num_computed
            counts.append(count)
            num_left -= count
            if num_left == 0:
                break
        num_seqs = len(counts)
        program = _smallest(self._prefill, sum(counts), num_seqs)
        return Batch.of(program, order[:num_seqs], counts)

    def decode(self, sequences: list[Sequence]) -> Batch:
        """One step of every sequence."""
        num_seqs = len(sequences)
        program = _smallest(self._decode, num_seqs, num_seqs)
        counts = [program.query_len] * num_seqs
        return Batch.of(program, sequences, counts)

    def _priority(self, sequence: Sequence) -> tuple[int, int]:
        """The smallest is served first; numbers are in order of arrival."""
        if self._oldest_first:
            return 0, sequence.number
        return sequence.num_left, sequence.number


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
