"""Triton backend: the bundle's own kernels, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenspeed_plan.plans.kernel_abi import bind_launch, num_ranks
from tokenspeed_plan.plans.kernel_file import load_function, read_source
from tokenspeed_plan.plans.schema import KernelSpec, Plan
from tokenspeed_plan.runtime.execution.collectives import Collectives
from tokenspeed_plan.runtime.execution.interpreter import interpret
from tokenspeed_plan.runtime.execution.kernels import Launcher


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
        collectives: Collectives | None = None,
    ) -> Launcher:
        """A function of the kernel's tensors, in the order of its parameters.

        The size of the batch is bound.
        """
        assert kernel.launch is not None
        launch, function = kernel.launch, self._function(kernel)
        grid = tuple(dim.at(num_tokens, num_seqs) for dim in launch.grid)
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}

        def run(attrs: object, *tensors: Tensor) -> tuple[()]:
            mirrors = None
            if kernel.reduced_operand is not None and collectives is not None:
                mirrors = _Mirrors(kernel, tensors, rank, collectives)
            tables = mirrors.tables if mirrors is not None else {}
            values = bind_launch(kernel, rank, num_tokens, num_seqs, tables)
            function[grid](*tensors, *values, **options)
            return ()

        return run

    def _function(self, kernel: KernelSpec) -> Any:
        if kernel.name not in self._functions:
            self._functions[kernel.name] = load_function(kernel, self._sources[kernel.name])
        return self._functions[kernel.name]


class _Mirrors:
    """Peer memory on a machine without it.

    It has a copy of every rank's part, and flags as if all peers had arrived. `tables` has the
    addresses of both, by the role of the parameter that takes them; they are valid as long as this
    object lives.
    """

    def __init__(
        self,
        kernel: KernelSpec,
        tensors: Sequence[Tensor],
        rank: int,
        collectives: Collectives,
    ) -> None:
        names = [param.name for param in kernel.tensors]
        assert kernel.reduced_operand is not None
        part = tensors[names.index(kernel.reduced_operand)]
        world = num_ranks(kernel)
        gathered = part.new_empty(*part.shape[:-1], world * part.shape[-1])
        collectives.all_gather(part, gathered)
        self._parts = gathered.unflatten(-1, (world, -1)).movedim(-2, 0).contiguous()
        self._flags = torch.zeros(world, 2 * part.shape[0], world, dtype=torch.int32)
        self._flags[rank] = 1  # set by the peers, and not yet by this rank itself
        self._flags[rank, :, rank] = 0
        self.tables = {
            "peer_table": _addresses(self._parts),
            "signal_table": _addresses(self._flags),
        }


def _addresses(tensors: Tensor) -> Tensor:
    """Where each rank's part begins, i64[num_ranks]."""
    return torch.tensor([tensor.data_ptr() for tensor in tensors])
