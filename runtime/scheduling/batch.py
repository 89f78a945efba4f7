"""A batch: which sequences a step computes, with which program, and in which state slots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tokenspeed_plan.plans.schema import Limits, Plan, Program
from tokenspeed_plan.plans.types import Phase
from tokenspeed_plan.runtime.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """One step.

    `counts` are the tokens to compute of each sequence, drafts included. A batch that was launched
    before the one before it was committed does not know its state slots: the device does.
    """

    program: Program
    sequences: tuple[Sequence, ...]
    counts: tuple[int, ...]
    src_state_slots: tuple[int, ...]
    dst_state_slots: tuple[tuple[int, ...], ...]
    pages_versions: tuple[int, ...]

    @classmethod
    def of(cls, program: Program, sequences: Iterable[Sequence], counts: Iterable[int]) -> Batch:
        """The next step of sequences as they are."""
        held = tuple(sequences)
        return cls(
            program,
            held,
            tuple(counts),
            tuple(s.state_slot for s in held),
            tuple(tuple(s.own_slots) for s in held),
            tuple(s.pages_version for s in held),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of its sequences, drafts included."""
        return sum(self.counts)

    @property
    def run_tokens(self) -> int:
        """Tokens that the program runs on: with padding, where it is captured."""
        return self.program.max_tokens if self.program.captured else self.num_tokens

    @property
    def run_seqs(self) -> int:
        """Sequences that the program runs on: with padding, where it is captured."""
        return self.program.max_seqs if self.program.captured else len(self.sequences)

    @property
    def has_no_output(self) -> bool:
        """Whether nobody waits for tokens or drafts: every sequence stays inside its prompt."""
        pairs = zip(self.sequences, self.counts, strict=True)
        return self.program.phase == "prefill" and all(
            count + 1 < sequence.num_left for sequence, count in pairs
        )

    def follows(self, other: Batch | None) -> bool:
        """Whether it is the decode step right after `other`, whose program has prepared all inputs."""
        return (
            other is not None
            and self.program is other.program
            and self.program.phase == "decode"
            and self.sequences == other.sequences
            and self.pages_versions == other.pages_versions
        )


class BatchMaker:
    """Cuts prompts into chunks, and finds the smallest program that takes a batch.

    Prefill steps serve by turns the oldest prompt first, so that none starves, and the one with the
    least to do first, so that a short one need not wait for long ones.
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
        for sequence in order:
            end = sequence.chunk_end(max_tokens, self._limits.checkpoint_interval)
            counts.append(end - sequence.num_computed)
            max_tokens -= counts[-1]
            if max_tokens == 0:
                break
        tokens, seqs = sum(counts), len(counts)
        program = next(p for p in self._prefill if p.max_tokens >= tokens and p.max_seqs >= seqs)
        return Batch.of(program, order[:seqs], counts)

    def decode(self, sequences: list[Sequence]) -> Batch:
        """One step of every sequence."""
        program = next(p for p in self._decode if p.max_seqs >= len(sequences))
        return Batch.of(program, sequences, [program.query_len] * len(sequences))

    def _priority(self, sequence: Sequence) -> tuple[int, int]:
        num_left = 0 if self._oldest_first else sequence.num_left
        return num_left, sequence.number


def _programs(plan: Plan, phase: Phase) -> list[Program]:
    """The programs of a phase, the smallest first."""
    programs = [program for program in plan.pool.programs if program.phase == phase]
    return sorted(programs, key=lambda program: program.bucket)
