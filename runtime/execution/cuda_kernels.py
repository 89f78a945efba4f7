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
from tokenspeed_plan.plans.schema import Binary, KernelSpec, Plan
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
        self._driver = find_driver()
        self._binaries = binaries
        self._cubins = cubins
        self._functions: dict[str, Any] = {}
        self._allow_overlap = overlap
        self._overlap = [self._overlap_attribute()]

    def _overlap_attribute(self) -> Any:
        """Lets a kernel start before its predecessor has ended (programmatic dependent launch)."""
        kinds = self._driver.CUlaunchAttributeID
        attribute = self._driver.CUlaunchAttribute()
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
        driver = self._driver
        function = self._function(kernel)
        config = self._config(kernel, num_tokens, num_seqs)
        tables = launch_tables(peers, program)
        values = bind_launch(kernel, rank, num_tokens, num_seqs, tables)
        bound: dict[tuple[int, ...], _Arguments] = {}
        current_stream = torch._C._cuda_getCurrentRawStream
        device = torch.cuda.current_device()

        def run(attrs: object, *tensors: Tensor) -> tuple[()]:
            key = tuple(x.data_ptr() for x in tensors)
            if key not in bound:
                bound[key] = _Arguments(kernel, (*key, *values))
            config.hStream = current_stream(device)
            call(driver.cuLaunchKernelEx, config, function, bound[key].address, 0)
            return ()

        return run

    def _config(self, kernel: KernelSpec, num_tokens: int, num_seqs: int) -> Any:
        """Grid, block, shared memory and attributes of a launch; each launch sets its stream."""
        launch = kernel.launch
        assert launch is not None
        grid = [dim.at(num_tokens, num_seqs) for dim in launch.grid]
        config = self._driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
        config.blockDimX = launch.num_warps * WARP_SIZE
        config.blockDimY = 1
        config.blockDimZ = 1
        config.sharedMemBytes = self._binaries[kernel.name].shared_bytes
        if launch.pdl and self._allow_overlap:
            config.attrs = self._overlap
            config.numAttrs = 1
        return config

    def _function(self, kernel: KernelSpec) -> Any:
        """The driver's handle; the cubin is loaded at the first call."""
        if kernel.name not in self._functions:
            self._functions[kernel.name] = self._load_function(kernel)
        return self._functions[kernel.name]

    def _load_function(self, kernel: KernelSpec) -> Any:
        driver = self._driver
        module = call(driver.cuModuleLoadData, self._cubins[kernel.name])
        entry = kind_of(kernel).encode()
        function = call(driver.cuModuleGetFunction, module, entry)
        shared_bytes = self._binaries[kernel.name].shared_bytes
        if shared_bytes > DEFAULT_SHARED_BYTES:
            attributes = driver.CUfunction_attribute
            limit = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            call(driver.cuFuncSetAttribute, function, limit, shared_bytes)
        return function


class _Arguments:
    """A kernel's arguments in C, and a table of their addresses for the driver.

    Args:
        kernel: names each argument by its parameters.
        values: one a parameter: an address (or a tensor, for its address) or a 32-bit scalar.
    """

    def __init__(self, kernel: KernelSpec, values: Sequence[int | Tensor]) -> None:
        self._tensors = [value for value in values if isinstance(value, Tensor)]  # kept alive
        self._values: list[ctypes.c_void_p | ctypes.c_int32] = []
        for param, value in zip(kernel.params, values, strict=True):
            if isinstance(value, Tensor):
                value = value.data_ptr()
            is_scalar = not param.tensor.shape
            if is_scalar:
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
