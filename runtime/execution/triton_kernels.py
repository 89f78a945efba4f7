"""Triton backend: the bundle's own kernels, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenspeed_plan.plans.kernel_abi import bind_launch
from tokenspeed_plan.plans.kernel_file import load_function, read_source
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
        assert kernel.launch is not None
        launch, function = kernel.launch, self._function(kernel)
        grid = tuple(dim.at(num_tokens, num_seqs) for dim in launch.grid)
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        tables = launch_tables(peers, program)
        values = bind_launch(kernel, rank, num_tokens, num_seqs, tables)

        def run(attrs: object, *tensors: Tensor) -> tuple[()]:
            function[grid](*tensors, *values, **options)
            return ()

        return run

    def _function(self, kernel: KernelSpec) -> Any:
        if kernel.name not in self._functions:
            self._functions[kernel.name] = load_function(kernel, self._sources[kernel.name])
        return self._functions[kernel.name]
