"""The programs of a plan, bound to their tensors.

Each size of batch is bound once; a replay is then a loop over instructions, without look-ups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from tokenspeed_plan.plans.schema import CollectiveCall, Plan, Program
from tokenspeed_plan.runtime.execution.backend import (
    Backend,
    BoundStep,
    Instruction,
    execute,
    num_outputs,
)
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory, operands_of

Operands = list[tuple[Tensor, ...]]  # the tensors of each step
ProgramKey = tuple[str, int]  # phase and bucket
BatchKey = tuple[str, int, int, int]  # and tokens and sequences

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
        self._full_size_operands: dict[ProgramKey, Operands] = {}

    @property
    def plan(self) -> Plan:
        """The plan of these programs."""
        return self.memory.plan

    def instructions(self, program: Program, num_tokens: int, num_seqs: int) -> list[Instruction]:
        """The instructions of a program for a batch of this size, bound at the first call."""
        key = (program.phase, program.bucket, num_tokens, num_seqs)
        if key not in self._bound:
            if len(self._bound) >= MAX_BINDINGS:
                self._bound.clear()
            instructions: list[Instruction] = []
            for _, bound in self.steps(program, num_tokens, num_seqs):
                instructions += bound
            self._bound[key] = instructions
        return self._bound[key]

    @torch.inference_mode()
    def run(self, program: Program, num_tokens: int, num_seqs: int) -> None:
        """One replay; inputs and outputs are in the io buffers."""
        instructions = self.instructions(program, num_tokens, num_seqs)
        self.execute(instructions)

    def execute(self, instructions: Iterable[Instruction]) -> None:
        """Run instructions in order."""
        execute(instructions, self._num_slots)

    def steps(self, program: Program, num_tokens: int, num_seqs: int) -> Iterator[BoundStep]:
        """Each step of a program with its instructions."""
        operands = self._operands(program, num_tokens, num_seqs)
        return self.backend.bind(program, operands, num_tokens, num_seqs)

    def _operands(self, program: Program, num_tokens: int, num_seqs: int) -> Operands:
        """The tensors of each step.

        Kernels take tensors of the program's full size, and the size of the batch as scalars; what
        ranks exchange is as large as the batch.
        """
        if not self.backend.full_size:
            return self._bind_operands(program, num_tokens, num_seqs)
        key = (program.phase, program.bucket)
        operands = self._full_size_operands.get(key)
        if operands is None:
            operands = self._bind_operands(program, program.max_tokens, program.max_seqs)
            self._full_size_operands[key] = operands
        if not any(isinstance(step, CollectiveCall) for step in program.steps):
            return operands
        tensor_of = self.memory.tensors_of(program, num_tokens, num_seqs)
        return [
            operands_of(step, tensor_of) if isinstance(step, CollectiveCall) else full
            for step, full in zip(program.steps, operands, strict=True)
        ]

    def _bind_operands(self, program: Program, num_tokens: int, num_seqs: int) -> Operands:
        tensor_of = self.memory.tensors_of(program, num_tokens, num_seqs)
        return [operands_of(step, tensor_of) for step in program.steps]
