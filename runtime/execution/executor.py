"""Replays the programs of a plan on one rank.

An executor has three strategies, which combine freely: a `Backend` runs steps (as reference bodies,
Triton kernels or cubins), a `Launch` launches programs (step by step, or as CUDA graphs), and a
`Lead` keeps ranks together (none without others; a leader sends orders to those that follow).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from tokenspeed_plan.plans.peer_memory import ERROR, PEER_SIGNALS, STOP, explain
from tokenspeed_plan.plans.schema import Program
from tokenspeed_plan.runtime.cache.slot_copies import Copying, SlotCopy
from tokenspeed_plan.runtime.execution.backend import Backend, BoundStep, Instruction
from tokenspeed_plan.runtime.execution.bound_programs import BoundPrograms, Part
from tokenspeed_plan.runtime.execution.host_slots import HostSlots, LaneCopy
from tokenspeed_plan.runtime.execution.input_block import InputChange
from tokenspeed_plan.runtime.execution.launch import EagerLaunch, HostValues, Launch
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory
from tokenspeed_plan.runtime.execution.rank_loss import LOSS


class Lead:
    """Keeps the ranks of a plan together; this one has no others to keep."""

    def before_run(
        self,
        memory: PlanMemory,
        program: Program,
        num_tokens: int,
        num_seqs: int,
        change: InputChange | None,
        part: Part,
    ) -> None:
        """Called before each replay, after this rank's inputs were changed so, if at all."""

    def before_write(self, name: str, first: int, rows: Tensor) -> None:
        """Called before rows of an io buffer are written."""

    def before_copy(self, source: int, target: int) -> None:
        """Called before a page is copied."""

    def before_slots(self, copy: SlotCopy) -> None:
        """Called before slots are copied to the host or back."""

    def before_end(self, is_load: bool, number: int) -> None:
        """Called before steps are told to wait for such a copy."""


class Executor:
    """The programs of a plan on one rank.

    Args:
        memory: all tensors of the rank.
        backend: runs steps.
        launch: launches programs; step by step by default.
        lead: keeps other ranks together; there are none by default.

    Attributes:
        before_run: called before each replay, or part of one, and before other ranks hear of it.
    """

    def __init__(
        self,
        memory: PlanMemory,
        backend: Backend,
        launch: Launch | None = None,
        lead: Lead | None = None,
    ) -> None:
        self.plan = memory.plan
        self.memory = memory
        self.backend = backend
        self.launch = launch or EagerLaunch()
        self.lead = lead or Lead()
        self.before_run: Callable[[Part], object] = lambda part: None
        self.programs = BoundPrograms(memory, backend)
        self.kernels = {kernel.name: kernel for kernel in memory.plan.kernels}
        self._host: HostSlots | None = None  # the second tier of the prefix cache
        self._signals: Tensor | None = None  # of kernels that wait for peers
        if any(buffer.name == PEER_SIGNALS for buffer in memory.plan.pool.buffers):
            self._signals = memory.buffer(PEER_SIGNALS)

    def prepare(self) -> None:
        """Do what can be done before the first replay.

        Raises:
            PlanError: the host has not the memory that the plan wants for its second tier.
        """
        spec = self.plan.pool.host_cache
        if spec is not None:
            self._host = HostSlots(spec, self.memory)
        self.launch.prepare(self.programs)

    def buffer(self, name: str, num_tokens: int, num_seqs: int) -> Tensor:
        """A state or io buffer, at the size of a batch."""
        return self.memory.buffer(name, num_tokens, num_seqs)

    def run(
        self,
        program: Program,
        num_tokens: int,
        num_seqs: int,
        change: InputChange | None = None,
        part: Part = "whole",
    ) -> None:
        """One replay, or a part of one; inputs and outputs are in the io buffers.

        Args:
            program: what is replayed.
            num_tokens: of the batch.
            num_seqs: of the batch.
            change: how its inputs were changed, for the other ranks.
            part: all of the program, or what comes before or after its late rows.
        """
        self.before_run(part)
        self.lead.before_run(self.memory, program, num_tokens, num_seqs, change, part)
        self.launch.run(self.programs, program, num_tokens, num_seqs, part)

    def write_rows(self, name: str, first: int, rows: Tensor) -> None:
        """Write words to rows of an io buffer, which no step in flight reads.

        Args:
            name: of the buffer.
            first: of the rows.
            rows: their first words, i32, in memory of the host that stays as it is meanwhile.
        """
        self.lead.before_write(name, first, rows)
        num_rows, num_words = rows.shape
        buffer = self.memory.buffer(name, 0, first + num_rows)
        self.launch.copy_beside(buffer[first:, :num_words], rows)

    def copy_to_host(self, *values: Tensor) -> HostValues:
        """A function that waits for these outputs of the last replay, and returns them.

        It raises a RankError where a kernel has given up waiting for a peer.
        """
        if self._signals is None:
            return self.launch.copy_to_host(*values)
        wait = self.launch.copy_to_host(*values, self._signals)

        def checked() -> tuple[list[int], ...]:
            *found, signals = wait()
            fault = explain(signals[STOP], signals[ERROR])
            if fault:
                raise LOSS.error(fault)
            return tuple(found)

        return checked

    def copy_page(self, source: int, target: int) -> int:
        """Copy a page of keys and values in all layers; returns the bytes that were copied."""
        self.lead.before_copy(source, target)
        return self.memory.copy_page(source, target)

    def start_copy(self, copy: SlotCopy) -> LaneCopy:
        """Copy slots of the caches to the host or back, while steps go on; see `SlotMover`."""
        assert self._host is not None, "the plan has no second tier"
        self.lead.before_slots(copy)
        return self._host.start(copy)

    def end_copy(self, copying: Copying) -> None:
        """Let what is launched from now on wait for a copy, and those of its direction before it.

        The other ranks may still be at it where this one is done.
        """
        self.end_copies(copying.is_load, copying.number)

    def end_copies(self, is_load: bool, number: int) -> None:
        """The same, of all copies of a direction up to a number."""
        assert self._host is not None, "the plan has no second tier"
        self.lead.before_end(is_load, number)
        self._host.end(is_load, number)

    def without_overlap(self) -> Executor:
        """The same steps one by one: no kernel starts before its predecessor has ended."""
        backend = self.backend.without_overlap()
        return Executor(self.memory, backend)

    def steps(self, program: Program, num_tokens: int, num_seqs: int) -> Iterator[BoundStep]:
        """Each step of a program with its instructions."""
        return self.programs.steps(program, num_tokens, num_seqs)

    def execute(self, instructions: Iterable[Instruction]) -> None:
        """Run instructions in order."""
        self.programs.execute(instructions)

    def buffer_of(self, program: Program, name: str, num_tokens: int, num_seqs: int) -> Tensor:
        """Any tensor of a program, at the size of a batch."""
        tensor_of = self.memory.tensors_of(program, num_tokens, num_seqs)
        return tensor_of(name)
