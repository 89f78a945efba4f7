"""Triton backend: the bundle's own kernels, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenspeed_plan.plans.kernel_abi import bind_launch
from tokenspeed_plan.plans.kernel_file import first_warps, load_function, read_source
from tokenspeed_plan.plans.schema import KernelSpec, Plan
from tokenspeed_plan.runtime.execution.interpreter import interpret
from tokenspeed_plan.runtime.execution.kernels import Launcher
from tokenspeed_plan.runtime.execution.peer_arenas import PeerMemory, launch_tables


class TritonKernels:
    """Kernels from their texts, by Triton."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self._sources = sources
        self._functions: dict[str, Any] = {}

    @classmethod
    def load(cls, plan: Plan, bundle: Path) -> TritonKernels:
        """The kernels of a bundle, all of their texts checked; on a CPU they will be interpreted.

        Raises:
            PlanError: a text is missing or was altered, or Triton is not installed.
        """
        sources = {
            kernel.name: read_source(bundle, kernel)
            for kernel in plan.kernels
            if kernel.launch is not None
        }
        if plan.target.sm == 0:
            interpret()
        return cls(sources)

    def has(self, kernel: KernelSpec) -> bool:
        """Whether the kernel has a Triton body that one rank can run alone."""
        return kernel.launch is not None and kernel.name in self._sources

    def without_overlap(self) -> TritonKernels:
        """Triton's launches never overlap."""
        return self

    def launches(
        self, rank: int, peers: PeerMemory | None = None, program: int = 0
    ) -> TritonLaunches:
        """Launches of a program, of which none is bound yet."""
        return TritonLaunches(self, rank, launch_tables(peers, program))

    def launcher(
        self,
        kernel: KernelSpec,
        rank: int,
        num_tokens: int,
        num_seqs: int,
        peers: PeerMemory | None = None,
        program: int = 0,
    ) -> Launcher:
        """A function of the kernel's tensors, in the order of its parameters.

        The size of the batch is bound.
        """
        launches = self.launches(rank, peers, program)
        launches.resize(num_tokens, num_seqs)
        return launches.launcher(kernel)

    def function(self, kernel: KernelSpec) -> Any:
        """The kernel as Triton's function, which is made at the first call."""
        if kernel.name not in self._functions:
            self._functions[kernel.name] = load_function(kernel, self._sources[kernel.name])
        return self._functions[kernel.name]


class TritonLaunches:
    """The launches of one program: grids and scalars follow from the size when they are launched.

    Args:
        kernels: have the functions.
        rank: of this process.
        tables: what a kernel needs to reach its peers.
    """

    def __init__(
        self, kernels: TritonKernels, rank: int, tables: Mapping[str, int | Tensor]
    ) -> None:
        self._kernels = kernels
        self._rank = rank
        self._tables = tables
        self._size = (0, 0)

    def resize(self, num_tokens: int, num_seqs: int) -> None:
        """Make them for a batch of this size."""
        self._size = (num_tokens, num_seqs)

    def bind(self, kernel: KernelSpec, tensors: Sequence[Tensor]) -> Launcher:
        """A launch of a kernel on these tensors."""
        run, own = self.launcher(kernel), tuple(tensors)
        return lambda attrs: run(attrs, *own)

    def launcher(self, kernel: KernelSpec) -> Launcher:
        """A function of the kernel's tensors, for the size that there is then."""
        assert kernel.launch is not None
        launch, function = kernel.launch, self._kernels.function(kernel)
        num_warps = first_warps(function, launch)
        options = {"num_warps": num_warps, "num_stages": launch.num_stages}
        bind_launch(kernel, self._rank, *self._size, self._tables)  # raises if a table is missing

        def run(attrs: object, *tensors: Tensor) -> tuple[()]:
            grid = tuple(dim.at(*self._size) for dim in launch.grid)
            values = bind_launch(kernel, self._rank, *self._size, self._tables)
            function[grid](*tensors, *values, **options)
            return ()

        return run
