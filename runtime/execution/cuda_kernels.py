"""Kernels from a bundle's cubins, started through the CUDA driver: no compiler, no Triton.

A kernel takes its parameters in the order of `KernelSpec.params`, then two scratch pointers of
Triton's that ours do not use.
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
from tokenspeed_plan.runtime.execution.collectives import Collectives
from tokenspeed_plan.runtime.execution.kernels import Launcher

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
    return results[0] if len(results) == 1 else tuple(results)


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
        self._driver = driver = find_driver()
        self._binaries = binaries
        self._cubins = cubins
        self._functions: dict[str, Any] = {}
        self._allow_overlap = overlap
        attribute = driver.CUlaunchAttribute()
        attribute.id = (
            driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        )
        attribute.value.programmaticStreamSerializationAllowed = 1
        self._overlap = [attribute]

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
        collectives: Collectives | None = None,
    ) -> Launcher:
        """A function of the kernel's tensors, in the order of its parameters, for a batch of this size."""
        assert kernel.launch is not None
        launch, function, driver = kernel.launch, self._function(kernel), self._driver
        grid = [dim.at(num_tokens, num_seqs) for dim in launch.grid]
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.num_warps * WARP_SIZE, 1, 1
        config.sharedMemBytes = self._binaries[kernel.name].shared_bytes
        if launch.pdl and self._allow_overlap:
            config.attrs, config.numAttrs = self._overlap, 1
        values: tuple[int | Tensor, ...] = bind_launch(kernel, rank, num_tokens, num_seqs)
        bound: dict[tuple[int, ...], _Arguments] = {}
        current_stream, device = torch._C._cuda_getCurrentRawStream, torch.cuda.current_device()

        def run(attrs: object, *tensors: Tensor) -> tuple[()]:
            key = tuple(x.data_ptr() for x in tensors)
            if key not in bound:
                bound[key] = _Arguments(kernel, (*key, *values))
            config.hStream = current_stream(device)
            call(driver.cuLaunchKernelEx, config, function, bound[key].address, 0)
            return ()

        return run

    def _function(self, kernel: KernelSpec) -> Any:
        if kernel.name not in self._functions:
            driver = self._driver
            module = call(driver.cuModuleLoadData, self._cubins[kernel.name])
            function = call(driver.cuModuleGetFunction, module, kind_of(kernel).encode())
            shared = self._binaries[kernel.name].shared_bytes
            if shared > DEFAULT_SHARED_BYTES:
                name = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                call(driver.cuFuncSetAttribute, function, name, shared)
            self._functions[kernel.name] = function
        return self._functions[kernel.name]


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
            self._values.append(ctypes.c_int32(value) if is_scalar else ctypes.c_void_p(value))
        self._values += [ctypes.c_void_p(), ctypes.c_void_p()]
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
