"""The protocol of a plan's kernels; Triton and the CUDA driver implement it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from tokenspeed_plan.plans.schema import KernelSpec
from tokenspeed_plan.runtime.execution.peer_arenas import PeerMemory

# Takes the constants of an operator, which a kernel ignores, then the kernel's tensors.
Launcher = Callable[..., tuple[()]]


class PreparedFunction(ABC):
    """A function of a kernel's tensors for which the host plans each batch first."""

    @abstractmethod
    def prepare(self, *tensors: Tensor) -> None:
        """Plan a batch, whose calls all have inputs of these shapes and the same lengths."""

    @abstractmethod
    def __call__(self, _: object, *tensors: Tensor) -> tuple[()]:
        """Compute the batch that was planned last."""


def prepare_batch(launcher: Launcher, tensors: Sequence[Tensor]) -> None:
    """Let the host plan a batch, where the launcher needs that."""
    if isinstance(launcher, PreparedFunction):
        launcher.prepare(*tensors)


class Launches(Protocol):
    """The launches of one program, which all have the size of the batch in common."""

    def resize(self, num_tokens: int, num_seqs: int) -> None:
        """Make them for a batch of this size. Those that were launched before are left alone."""

    def bind(self, kernel: KernelSpec, tensors: Sequence[Tensor]) -> Launcher:
        """A launch of a kernel on these tensors, which takes only the constants of an operator."""


class Kernels(Protocol):
    """The kernels of a plan as functions of tensors."""

    def has(self, kernel: KernelSpec) -> bool:
        """Whether this kernel can be launched here."""

    def without_overlap(self) -> Kernels:
        """The same kernels; none of them starts before its predecessor has ended."""

    def launches(self, rank: int, peers: PeerMemory | None = None, program: int = 0) -> Launches:
        """Launches of a program, of which none is bound yet.

        Args:
            rank: of this process.
            peers: the memory of the other ranks, where there are any.
            program: its index among those of its pool.
        """

    def launcher(
        self,
        kernel: KernelSpec,
        rank: int,
        num_tokens: int,
        num_seqs: int,
        peers: PeerMemory | None = None,
        program: int = 0,
    ) -> Launcher:
        """A function of the kernel's tensors, in the order of its parameters, for this size.

        Args:
            kernel: what is launched.
            rank: of this process.
            num_tokens: of the batch.
            num_seqs: of the batch.
            peers: the memory of the other ranks, where there are any.
            program: index of the program that calls it.
        """
