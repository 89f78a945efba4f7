"""A program that is bound once, at its full size, and launched for batches of any size.

Kernels get addresses, which do not depend on the batch. What does is little: the grids, two numbers
that all launches share, and the tensors of collectives and libraries, which are as large as the
batch. So a prompt of a new length costs the host microseconds, not a new list of launches.
"""

from __future__ import annotations

from tokenspeed_plan.plans.schema import Program
from tokenspeed_plan.runtime.execution.backend import BoundStep, Instruction, KernelBackend
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory, operands_of


class FullProgram:
    """The steps of a program, bound to its tensors at full size.

    Args:
        program: of the plan.
        backend: launches kernels.
        memory: has the tensors.
    """

    def __init__(self, program: Program, backend: KernelBackend, memory: PlanMemory) -> None:
        self._program = program
        self._memory = memory
        self._backend = backend
        self._launches = backend.launches(program)
        full = memory.tensors_of(program, program.max_tokens, program.max_seqs)
        self.steps: list[BoundStep] = [
            (step, backend.bind_launch(step, operands_of(step, full), self._launches))
            for step in program.steps
        ]
        self._size = (0, 0)
        self._instructions = [each for _, bound in self.steps for each in bound]
        self._sized = [
            (index, sum(len(earlier) for _, earlier in self.steps[:index]))
            for index, (step, _) in enumerate(self.steps)
            if backend.takes_batch(step)
        ]

    def instructions(self, num_tokens: int, num_seqs: int) -> list[Instruction]:
        """All instructions, for a batch of this size."""
        if self._size != (num_tokens, num_seqs):
            self._resize(num_tokens, num_seqs)
        return self._instructions

    def _resize(self, num_tokens: int, num_seqs: int) -> None:
        self._launches.resize(num_tokens, num_seqs)
        tensor_of = self._memory.tensors_of(self._program, num_tokens, num_seqs)
        for index, place in self._sized:
            step, before = self.steps[index]
            operands = operands_of(step, tensor_of)
            bound = self._backend.bind_launch(step, operands, self._launches)
            self.steps[index] = (step, bound)
            self._instructions[place : place + len(before)] = bound
        self._size = (num_tokens, num_seqs)
