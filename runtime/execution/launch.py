"""What launches a program: step after step from the host here, as one CUDA graph in `graphs.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from tokenspeed_plan.plans.schema import Program
from tokenspeed_plan.runtime.execution.bound_programs import BoundPrograms

HostValues = Callable[[], tuple[list[int], ...]]  # waits for them


class Launch(Protocol):
    """Starts replays, and brings their outputs to the host."""

    def prepare(self, programs: BoundPrograms) -> None:
        """Whatever can be done before the first replay."""

    def run(
        self, programs: BoundPrograms, program: Program, num_tokens: int, num_seqs: int
    ) -> None:
        """Start one replay on the io buffers."""

    def copy_to_host(self, *values: Tensor) -> HostValues:
        """A function that waits for the values of the last replay and returns them."""


class EagerLaunch:
    """One step after the other; outputs are read at once."""

    def prepare(self, programs: BoundPrograms) -> None:
        """There is nothing to prepare."""

    def run(
        self, programs: BoundPrograms, program: Program, num_tokens: int, num_seqs: int
    ) -> None:
        """Run all instructions in order."""
        programs.run(program, num_tokens, num_seqs)

    def copy_to_host(self, *values: Tensor) -> HostValues:
        """The values are read now: where the device computes in order, they are there already."""
        found: tuple[list[int], ...] = tuple(value.flatten().tolist() for value in values)
        return lambda: found
