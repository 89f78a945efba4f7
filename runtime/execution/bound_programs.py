"""The programs of a plan, bound to tensors once, then run in a loop that looks nothing up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from tokenspeed_plan.plans.schema import Plan, Program
from tokenspeed_plan.runtime.execution.backend import (
    Backend,
    BoundStep,
    Instruction,
    execute,
    num_outputs,
)
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory, operands_of

MAX_BINDINGS = 64  # distinct (program, tokens, sequences) kept bound


class BoundPrograms:
    """Programs with their instructions for each size of batch."""

    def __init__(self, memory: PlanMemory, backend: Backend) -> None:
        self.memory = memory
        self.backend = backend
        self._num_slots = max(map(num_outputs, memory.plan.kernels), default=0)
        self._bound: dict[tuple[str, int, int, int], list[Instruction]] = {}
        self._full_size_operands: dict[tuple[str, int], list[tuple[Tensor, ...]]] = {}

    @property
    def plan(self) -> Plan:
        """Whose programs these are."""
        return self.memory.plan

    def instructions(self, program: Program, num_tokens: int, num_seqs: int) -> list[Instruction]:
        """All instructions of a program for a batch of this size; bound at the first call."""
        key = (program.phase, program.bucket, num_tokens, num_seqs)
        if key not in self._bound:
            if len(self._bound) >= MAX_BINDINGS:
                self._bound.clear()
            bound = self.steps(program, num_tokens, num_seqs)
            self._bound[key] = [instruction for _, step in bound for instruction in step]
        return self._bound[key]

    @torch.inference_mode()
    def run(self, program: Program, num_tokens: int, num_seqs: int) -> None:
        """One replay; inputs and outputs are in the io buffers."""
        self.execute(self.instructions(program, num_tokens, num_seqs))

    def execute(self, instructions: Iterable[Instruction]) -> None:
        """Run instructions in order."""
        execute(instructions, self._num_slots)

    def steps(self, program: Program, num_tokens: int, num_seqs: int) -> Iterator[BoundStep]:
        """Each step of a program with its instructions."""
        operands = self._operands(program, num_tokens, num_seqs)
        return self.backend.bind(program, operands, num_tokens, num_seqs)

    def _operands(
        self, program: Program, num_tokens: int, num_seqs: int
    ) -> list[tuple[Tensor, ...]]:
        if not self.backend.full_size:
            return self._bind_operands(program, num_tokens, num_seqs)
        key = (program.phase, program.bucket)
        if key not in self._full_size_operands:
            full_size = (program.max_tokens, program.max_seqs)
            self._full_size_operands[key] = self._bind_operands(program, *full_size)
        return self._full_size_operands[key]

    def _bind_operands(
        self, program: Program, num_tokens: int, num_seqs: int
    ) -> list[tuple[Tensor, ...]]:
        tensor_of = self.memory.tensors_of(program, num_tokens, num_seqs)
        return [operands_of(step, tensor_of) for step in program.steps]
