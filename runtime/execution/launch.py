"""How a program is launched: step by step from the host.

`graphs.py` launches it as one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tokenspeed_plan.plans.schema import Program
from tokenspeed_plan.runtime.execution.bound_programs import BoundPrograms, Part

# Waits for the values of a replay, and returns them.
HostValues = Callable[[], tuple[list[int], ...]]


class Launch(Protocol):
    """Starts replays, and copies their outputs to the host."""

    def prepare(self, programs: BoundPrograms) -> None:
        """Do what can be done before the first replay."""

    def run(
        self,
        programs: BoundPrograms,
        program: Program,
        num_tokens: int,
        num_seqs: int,
        part: Part = "whole",
    ) -> None:
        """Start one replay on the io buffers, or a part of one."""

    def copy_beside(self, target: Tensor, source: Tensor) -> None:
        """Copy from the host beside what is in flight; what is launched later waits for it."""

    def copy_to_host(self, *values: Tensor) -> HostValues:
        """A function that waits for these outputs of the last replay, and returns them."""


@dataclass(slots=True, eq=False)
class AroundLaunch:
    """The launch inside; what is derived does something around its replays or copies."""

    inner: Launch

    def prepare(self, programs: BoundPrograms) -> None:
        """As the launch inside."""
        self.inner.prepare(programs)

    def run(
        self,
        programs: BoundPrograms,
        program: Program,
        num_tokens: int,
        num_seqs: int,
        part: Part = "whole",
    ) -> None:
        """As the launch inside."""
        self.inner.run(programs, program, num_tokens, num_seqs, part)

    def copy_beside(self, target: Tensor, source: Tensor) -> None:
        """As the launch inside."""
        self.inner.copy_beside(target, source)

    def copy_to_host(self, *values: Tensor) -> HostValues:
        """As the launch inside."""
        return self.inner.copy_to_host(*values)


class EagerLaunch:
    """Launches one step after the other, and reads outputs at once."""

    def prepare(self, programs: BoundPrograms) -> None:
        """Nothing."""

    def run(
        self,
        programs: BoundPrograms,
        program: Program,
        num_tokens: int,
        num_seqs: int,
        part: Part = "whole",
    ) -> None:
        """Run all instructions in order."""
        programs.run(program, num_tokens, num_seqs, part)

    def copy_beside(self, target: Tensor, source: Tensor) -> None:
        """Nothing is in flight."""
        target.copy_(source)

    def copy_to_host(self, *values: Tensor) -> HostValues:
        """The values are read now; reading them waits for the replay."""
        read: list[list[int]] = []
        for value in values:
            flat = value.flatten()
            read.append(flat.tolist())
        return lambda: tuple(read)
