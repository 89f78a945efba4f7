"""Launches the programs of a prefill pool, and sends each layer's part while the next is computed.

The plan says after which step nobody writes a layer's caches any more (`Program.pushes`). What
leaves is known before a launch. On a GPU a push waits on a stream of its own for what was launched
before it; on a CPU it is made in its turn.
"""

from __future__ import annotations

from itertools import accumulate

from tokenspeed_plan.plans.schema import Program
from tokenspeed_plan.runtime.execution.bound_programs import BoundPrograms, Part, ProgramKey
from tokenspeed_plan.runtime.execution.launch import AroundLaunch, Launch
from tokenspeed_plan.runtime.pools.pool_rank import PoolRank


class LayerLaunch(AroundLaunch):
    """A launch with pushes between its steps.

    Args:
        inner: what launches.
        rank: what pushes.
    """

    def __init__(self, inner: Launch, rank: PoolRank) -> None:
        super().__init__(inner)
        self._rank = rank
        self._ends: dict[ProgramKey, list[int]] = {}

    def run(
        self,
        programs: BoundPrograms,
        program: Program,
        num_tokens: int,
        num_seqs: int,
        part: Part = "whole",
    ) -> None:
        """Start one replay on the io buffers, and what leaves of it; after a tail, all at once."""
        moves = self._rank.take_moves()
        if not moves:
            self.inner.run(programs, program, num_tokens, num_seqs, part)
            return
        instructions = programs.begin(program, num_tokens, num_seqs, part)
        begin, ends = 0, [len(instructions)] * len(program.pushes)
        if part == "whole":
            ends = self._ends_of(programs, program, num_tokens, num_seqs)
        for push, end in zip(program.pushes, ends, strict=True):
            programs.execute(instructions[begin:end])
            self._rank.push(moves, push.buffers)
            begin = end
        programs.execute(instructions[begin:])
        self._rank.finish(moves)

    def _ends_of(
        self, programs: BoundPrograms, program: Program, num_tokens: int, num_seqs: int
    ) -> list[int]:
        """How many instructions come before each push; batches of all sizes have as many."""
        key = (program.phase, program.bucket)
        if key not in self._ends:
            steps = programs.steps(program, num_tokens, num_seqs)
            ends = list(accumulate(len(bound) for _, bound in steps))
            self._ends[key] = [ends[push.step] for push in program.pushes]
        return self._ends[key]
