"""The protocol of a plan's kernels; Triton and the CUDA driver implement it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tokenspeed_plan.plans.schema import KernelSpec
from tokenspeed_plan.runtime.execution.collectives import Collectives

# Takes the constants of an operator, which a kernel ignores, then the kernel's tensors.
Launcher = Callable[..., tuple[()]]


class Kernels(Protocol):
    """The kernels of a plan as functions of tensors."""

    def has(self, kernel: KernelSpec) -> bool:
        """Whether this kernel can be launched here."""

    def without_overlap(self) -> Kernels:
        """The same kernels; none of them starts before its predecessor has ended."""

    def launcher(
        self,
        kernel: KernelSpec,
        rank: int,
        num_tokens: int,
        num_seqs: int,
        collectives: Collectives | None = None,
    ) -> Launcher:
        """A function of the kernel's tensors, in the order of its parameters, for this size."""
