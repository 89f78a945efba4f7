"""The programs of a plan, bound to their tensors.

A replay is a loop over instructions, without look-ups. On a GPU a program is bound once for all
batches (`full_program.py`), elsewhere once for each size of batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import torch

from tokenspeed_plan.plans.schema import KernelCall, Plan, Program
from tokenspeed_plan.runtime.execution.backend import (
    Backend,
    BoundStep,
    Instruction,
    KernelBackend,
    execute,
    num_outputs,
)
from tokenspeed_plan.runtime.execution.full_program import FullProgram
from tokenspeed_plan.runtime.execution.kernels import PreparedFunction
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory, operands_of

# The head of a program is launched while the step before is in flight; its tail begins where it
# reads masks or adjustments, which the host makes of that step's tokens.
Part = Literal["whole", "head", "tail"]
LATE_OPS = ("adjust", "mask")

ProgramKey = tuple[str, int]  # phase and bucket
BatchKey = tuple[str, int, int, int, Part]  # and tokens and sequences, and the part that is run

MAX_BINDINGS = 64  # distinct (program, tokens, sequences) kept bound


class BoundPrograms:
    """The instructions of each program for each size of batch.

    Args:
        memory: the tensors of the plan.
        backend: makes instructions of steps.
    """

    def __init__(self, memory: PlanMemory, backend: Backend) -> None:
        self.memory = memory
        self.backend = backend
        kernels = memory.plan.kernels
        self._num_slots = max(map(num_outputs, kernels), default=0)
        self._bound: dict[BatchKey, list[Instruction]] = {}
        self._full: dict[ProgramKey, FullProgram] = {}
        libraries = backend.libraries.values() if isinstance(backend, KernelBackend) else ()
        self._plans_batches = any(isinstance(each, PreparedFunction) for each in libraries)

    @property
    def plan(self) -> Plan:
        """The plan of these programs."""
        return self.memory.plan

    def instructions(
        self, program: Program, num_tokens: int, num_seqs: int, part: Part = "whole"
    ) -> list[Instruction]:
        """The instructions of a program for a batch of this size, bound at the first call."""
        full = self._full_program(program)
        if full is not None and part == "whole":
            return full.instructions(num_tokens, num_seqs)
        if full is not None:
            return self._instructions_of(program, num_tokens, num_seqs, part)
        key = (program.phase, program.bucket, num_tokens, num_seqs, part)
        if key not in self._bound:
            if len(self._bound) >= MAX_BINDINGS:
                self._bound.clear()
            self._bound[key] = self._instructions_of(program, num_tokens, num_seqs, part)
        return self._bound[key]

    def _instructions_of(
        self, program: Program, num_tokens: int, num_seqs: int, part: Part
    ) -> list[Instruction]:
        steps = list(self.steps(program, num_tokens, num_seqs))
        cut = 0
        if part != "whole":
            cut = self.tail_start(program)
        chosen = steps[:cut] if part == "head" else steps[cut:]
        return [one for _, bound in chosen for one in bound]

    def tail_start(self, program: Program) -> int:
        """The first step that reads what the host makes of the tokens of the step before."""
        late = {
            kernel.name
            for kernel in self.plan.kernels
            if any(part.kind in LATE_OPS for part in kernel.parts)
        }
        for number, step in enumerate(program.steps):
            if isinstance(step, KernelCall) and step.kernel in late:
                return number
        return len(program.steps)

    def run(self, program: Program, num_tokens: int, num_seqs: int, part: Part = "whole") -> None:
        """One replay, or a part of one; inputs and outputs are in the io buffers."""
        self.execute(self.begin(program, num_tokens, num_seqs, part))

    def begin(
        self, program: Program, num_tokens: int, num_seqs: int, part: Part = "whole"
    ) -> list[Instruction]:
        """The instructions of a replay that is executed next, in one go or piece by piece."""
        instructions = self.instructions(program, num_tokens, num_seqs, part)
        if self._plans_batches:
            self._prepare(instructions)
        return instructions

    def _prepare(self, instructions: Iterable[Instruction]) -> None:
        """Let the host plan the batch for functions of libraries, once for all of their calls."""
        prepared: set[PreparedFunction] = set()
        for body, _, operands, _ in instructions:
            if isinstance(body, PreparedFunction) and body not in prepared:
                prepared.add(body)
                body.prepare(*operands)  # type: ignore[arg-type]

    @torch.inference_mode()
    def execute(self, instructions: Iterable[Instruction]) -> None:
        """Run instructions in order."""
        execute(instructions, self._num_slots)

    def steps(self, program: Program, num_tokens: int, num_seqs: int) -> Iterator[BoundStep]:
        """Each step of a program with its instructions."""
        full = self._full_program(program)
        if full is not None:
            full.instructions(num_tokens, num_seqs)
            return iter(full.steps)
        tensor_of = self.memory.tensors_of(program, num_tokens, num_seqs)
        operands = [operands_of(step, tensor_of) for step in program.steps]
        return self.backend.bind(program, operands, num_tokens, num_seqs)

    def _full_program(self, program: Program) -> FullProgram | None:
        """The program bound at its full size, where the backend can."""
        if not isinstance(self.backend, KernelBackend) or not self.backend.full_size:
            return None
        key = (program.phase, program.bucket)
        if key not in self._full:
            self._full[key] = FullProgram(program, self.backend, self.memory)
        return self._full[key]
