"""Kernels from a bundle's cubins, launched through the CUDA driver, without compiler or Triton.

A kernel takes its parameters in the order of `KernelSpec.params`, then two scratch pointers that
Triton adds and our kernels do not use.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenspeed_plan.plans.bundle import CUBIN
from tokenspeed_plan.plans.canon import sha256
from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.kernel_abi import bind_launch
from tokenspeed_plan.plans.kernel_file import kind_of
from tokenspeed_plan.plans.schema import Binary, GridDim, KernelSpec, Plan
from tokenspeed_plan.plans.types import WARP_SIZE
from tokenspeed_plan.runtime.execution.kernels import Launcher
from tokenspeed_plan.runtime.execution.peer_arenas import PeerMemory, launch_tables

DEFAULT_SHARED_BYTES = 48 << 10  # a kernel that needs more has to ask


class CudaError(RuntimeError):
    """A call of the driver failed."""


def call(function: Any, *args: Any) -> Any:
    """The result of a driver function.

    Raises:
        CudaError: it returned an error code.
    """
    code, *results = function(*args)
    if code != 0:
        raise CudaError(f"{function.__name__}: {code.name}")
    if len(results) == 1:
        return results[0]
    return tuple(results)


def find_driver() -> Any:
    """The driver's functions.

    Raises:
        PlanError: the package is not there.
    """
    try:
        from cuda.bindings import driver  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise PlanError(
            "cubins are loaded through `cuda.bindings`, which is not installed",
            "install the extra `gpu`: `pip install 'tokenspeed-plan[gpu]'`",
        ) from error
    return driver


class CudaKernels:
    """The kernels of a plan as functions of tensors on the current GPU."""

    def __init__(
        self, binaries: Mapping[str, Binary], cubins: Mapping[str, bytes], overlap: bool = True
    ) -> None:
        self.driver = find_driver()
        self._binaries = binaries
        self._cubins = cubins
        self._functions: dict[str, Any] = {}
        self._allow_overlap = overlap
        self._overlap = [self._overlap_attribute()]

    def _overlap_attribute(self) -> Any:
        """Lets a kernel start before its predecessor has ended (programmatic dependent launch)."""
        kinds = self.driver.CUlaunchAttributeID
        attribute = self.driver.CUlaunchAttribute()
        attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        return attribute

    @classmethod
    def load(cls, plan: Plan, bundle: Path) -> CudaKernels:
        """The binaries of a bundle, all of them checked.

        Raises:
            PlanError: one is missing or was altered, or the plan was made without them.
        """
        if not plan.binaries:
            raise PlanError(
                "the plan has no binaries",
                "make it again with `tokenspeed plan` and no `--no-compile`",
            )
        return cls(
            {binary.kernel: binary for binary in plan.binaries},
            {binary.kernel: _read(bundle, binary) for binary in plan.binaries},
        )

    def has(self, kernel: KernelSpec) -> bool:
        """Whether there is a binary of it."""
        return kernel.name in self._cubins

    def without_overlap(self) -> CudaKernels:
        """The same kernels; none of them starts before its predecessor has ended."""
        return CudaKernels(self._binaries, self._cubins, overlap=False)

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

        The size of the batch is bound; arguments in C are kept for each set of addresses.
        """
        launches = self.launches(rank, peers, program)
        launches.resize(num_tokens, num_seqs)
        launches.prepare(kernel)
        bound: dict[tuple[int, ...], Launcher] = {}

        def run(attrs: object, *tensors: Tensor) -> tuple[()]:
            key = tuple(x.data_ptr() for x in tensors)
            if key not in bound:
                bound[key] = launches.bind(kernel, tensors)
            return bound[key](attrs)

        return run

    def launches(
        self, rank: int, peers: PeerMemory | None = None, program: int = 0
    ) -> CudaLaunches:
        """Launches of a program, of which none is bound yet."""
        return CudaLaunches(self, rank, launch_tables(peers, program))

    def config(self, kernel: KernelSpec) -> Any:
        """Block, shared memory and attributes of a launch; its grid and its stream come later."""
        launch = kernel.launch
        assert launch is not None
        config = self.driver.CUlaunchConfig()
        config.blockDimX = launch.num_warps * WARP_SIZE
        config.blockDimY = 1
        config.blockDimZ = 1
        config.sharedMemBytes = self._binaries[kernel.name].shared_bytes
        if launch.pdl and self._allow_overlap:
            config.attrs = self._overlap
            config.numAttrs = 1
        return config

    def function(self, kernel: KernelSpec) -> Any:
        """The driver's handle; the cubin is loaded at the first call."""
        if kernel.name not in self._functions:
            self._functions[kernel.name] = self._load_function(kernel)
        return self._functions[kernel.name]

    def _load_function(self, kernel: KernelSpec) -> Any:
        driver = self.driver
        module = call(driver.cuModuleLoadData, self._cubins[kernel.name])
        entry = kind_of(kernel).encode()
        function = call(driver.cuModuleGetFunction, module, entry)
        shared_bytes = self._binaries[kernel.name].shared_bytes
        if shared_bytes > DEFAULT_SHARED_BYTES:
            attributes = driver.CUfunction_attribute
            limit = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            call(driver.cuFuncSetAttribute, function, limit, shared_bytes)
        return function


# The driver's function, the configuration of its launches, and the values after its tensors.
_Prepared = tuple[Any, Any, tuple[int | Tensor, ...]]


class CudaLaunches:
    """The launches of one program.

    The driver reads arguments and grid when it launches. All launches point to the same two numbers
    of tokens and sequences, and those of one kernel share a grid.

    Args:
        kernels: have the functions.
        rank: of this process.
        tables: what a kernel needs to reach its peers.
    """

    def __init__(self, kernels: CudaKernels, rank: int, tables: Mapping[str, int | Tensor]) -> None:
        self._kernels = kernels
        self._rank = rank
        self._tables = tables
        self._size = {"num_tokens": ctypes.c_int32(), "num_seqs": ctypes.c_int32()}
        self._prepared: dict[str, _Prepared] = {}
        self._grids: list[tuple[Any, tuple[GridDim, ...]]] = []

    def resize(self, num_tokens: int, num_seqs: int) -> None:
        """Make them for a batch of this size."""
        self._size["num_tokens"].value = num_tokens
        self._size["num_seqs"].value = num_seqs
        for config, grid in self._grids:
            _set_grid(config, grid, num_tokens, num_seqs)

    def bind(self, kernel: KernelSpec, tensors: Sequence[Tensor]) -> Launcher:
        """A launch of a kernel on these tensors."""
        driver = self._kernels.driver
        function, config, values = self.prepare(kernel)
        addresses = (tensor.data_ptr() for tensor in tensors)
        arguments = _Arguments(kernel, (*addresses, *values), self._size)
        current_stream = torch._C._cuda_getCurrentRawStream
        device = torch.cuda.current_device()

        def run(attrs: object) -> tuple[()]:
            config.hStream = current_stream(device)
            call(driver.cuLaunchKernelEx, config, function, arguments.address, 0)
            return ()

        return run

    def prepare(self, kernel: KernelSpec) -> _Prepared:
        """What all launches of a kernel have in common.

        Raises:
            PlanError: the kernel needs a table that is not there.
        """
        if kernel.name not in self._prepared:
            assert kernel.launch is not None
            grid, config = kernel.launch.grid, self._kernels.config(kernel)
            values = bind_launch(kernel, self._rank, 0, 0, self._tables)
            _set_grid(config, grid, *(size.value for size in self._size.values()))
            self._grids.append((config, grid))
            self._prepared[kernel.name] = (self._kernels.function(kernel), config, values)
        return self._prepared[kernel.name]


def _set_grid(config: Any, grid: Sequence[GridDim], num_tokens: int, num_seqs: int) -> None:
    sizes = [dim.at(num_tokens, num_seqs) for dim in grid]
    config.gridDimX, config.gridDimY, config.gridDimZ = (*sizes, 1, 1)[:3]


class _Arguments:
    """A kernel's arguments in C, and a table of their addresses for the driver.

    Args:
        kernel: names each argument by its parameters.
        values: one a parameter: an address (or a tensor, for its address) or a 32-bit scalar.
        shared: scalars that launches have in common, by role; they stand in place of the values.
    """

    def __init__(
        self,
        kernel: KernelSpec,
        values: Sequence[int | Tensor],
        shared: Mapping[str, ctypes.c_int32] | None = None,
    ) -> None:
        shared = shared or {}
        self._tensors = [value for value in values if isinstance(value, Tensor)]  # kept alive
        self._values: list[ctypes.c_void_p | ctypes.c_int32] = []
        for param, value in zip(kernel.params, values, strict=True):
            if isinstance(value, Tensor):
                value = value.data_ptr()
            is_scalar = not param.tensor.shape
            if param.role in shared:
                self._values.append(shared[param.role])
            elif is_scalar:
                self._values.append(ctypes.c_int32(value))
            else:
                self._values.append(ctypes.c_void_p(value))
        self._values += [ctypes.c_void_p(), ctypes.c_void_p()]  # Triton's scratch pointers
        addresses = [ctypes.addressof(value) for value in self._values]
        self._table = (ctypes.c_void_p * len(addresses))(*addresses)
        self.address = ctypes.addressof(self._table)


def _read(bundle: Path, binary: Binary) -> bytes:
    path = bundle / CUBIN / f"{binary.kernel}.sm{binary.sm}.cubin"
    hint = "make it again with `tokenspeed plan SPEC -o DIR`"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PlanError(f"cannot read `{path}`", hint) from error
    if sha256(data) != binary.cubin_sha256:
        raise PlanError(f"`{path}` is not the plan's binary", hint)
    return data
