"""The functions of libraries that a step of a plan may call in the place of a kernel.

The planner prices them, the validator proves that they fit, and the runtime finds them by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenspeed_plan.plans.fp8_format import BLOCK, FP8, FP8_ROWS
from tokenspeed_plan.plans.ops import OPS, integer
from tokenspeed_plan.plans.schema import KernelSpec

INDEX = "i32"  # of page tables and lengths


@dataclass(frozen=True, slots=True)
class LibraryFunction:
    """What a function computes, where it does, and which package has it.

    Attributes:
        package: the distribution.
        versions: releases whose results and times were looked at.
        sms: compute capabilities that it has code for; 0 is a CPU.
        runs: the operators that one call computes: each run is the parts of a kernel.
        attrs: for constants of the first operator, the values that it may have.
        least_tokens: of a program that it was looked at in; its rows are always those of tokens.
        dtypes: of all tensors but indices, which are `i32`.
        needs: those of `dtypes` that there must be.
        unit: columns of each result are a multiple of it.
        prepare: what the host does before a replay.
        capturable: whether a CUDA graph may hold the call.
        head_bytes: of workspace for each query head of a token.
        fixed_bytes: of workspace whatever the batch.
    """

    package: str
    versions: str
    sms: tuple[int, ...]
    runs: tuple[tuple[str, ...], ...]
    attrs: Mapping[str, Collection[Any]]
    dtypes: tuple[str, ...]
    needs: tuple[str, ...] = ()
    unit: int = 1
    least_tokens: int = 1
    prepare: Literal["none", "batch"] = "none"
    capturable: bool = True
    head_bytes: int = 0
    fixed_bytes: int = 0

    def computes(
        self, kinds: tuple[str, ...], attrs: Mapping[str, Any], dtypes: Collection[str]
    ) -> bool:
        """Whether a call computes such operators.

        Args:
            kinds: of the operators, in order.
            attrs: constants of the first.
            dtypes: of all their tensors.
        """
        if kinds not in self.runs or any(attrs.get(k) not in v for k, v in self.attrs.items()):
            return False
        splits = attrs.get("splits", ())
        if self.unit > 1 and any(size % self.unit for size in splits):
            return False
        return set(self.needs) <= set(dtypes) - {INDEX} <= set(self.dtypes)

    def workspace_bytes(self, attrs: Mapping[str, Any], num_tokens: int) -> int:
        """Bytes that a call takes besides its operands."""
        if not self.head_bytes:
            return self.fixed_bytes
        return num_tokens * integer(attrs, "num_heads") * self.head_bytes + self.fixed_bytes


# FlashAttention-3 (arXiv:2407.08608). It returns the logarithm of each softmax's sum, 4 bytes.
# Where few queries have many keys it splits the keys: partial results of at most two waves of 132
# tiles with 128 rows of 256 fp32.
FA3 = LibraryFunction(
    package="tokenspeed-fa3",
    versions=">=3.0,<3.1",
    sms=(90,),
    runs=(("attention",), ("attention", "sigmoid_gate")),
    attrs={"mode": ("prefill",), "head_dim": (64, 128, 256)},
    dtypes=("bf16",),
    head_bytes=4,
    fixed_bytes=2 * 132 * 128 * 257 * 4,
)
# Products by cuBLAS through PyTorch, one for each result. PyTorch gives cuBLAS 32 MiB on Hopper.
CUBLAS = LibraryFunction(
    package="torch",
    versions=">=2.11,<3",
    sms=(90,),
    runs=(("linear",),),
    attrs={},
    dtypes=("bf16",),
    least_tokens=1024,
    fixed_bytes=32 << 20,
)
# FlashInfer (arXiv:2501.01005). Partial results of a batch, then what its wrapper adds; it compiles
# its kernels when it first plans a batch, and the host plans each one.
FLASHINFER_WORKSPACE_BYTES = 384 << 20
FLASHINFER = LibraryFunction(
    package="flashinfer-python",
    versions=">=0.6,<0.8",
    sms=(90,),
    runs=FA3.runs,
    attrs=FA3.attrs,
    dtypes=("bf16",),
    prepare="batch",
    capturable=False,
    fixed_bytes=FLASHINFER_WORKSPACE_BYTES + (16 << 20),
)
# FP8 times FP8 by cuBLAS, with factors of blocks of 128 x 128, and of 128 columns of a row. Beside
# its workspace there are those of the activations once more, by columns: 4 bytes for each 128.
CUBLAS_FP8 = LibraryFunction(
    package="torch",
    versions=">=2.11,<3",
    sms=(90,),
    runs=(("linear",), ("linear", "add")),
    attrs={},
    dtypes=("bf16", str(FP8), str(FP8_ROWS)),
    needs=(str(FP8), str(FP8_ROWS)),
    unit=BLOCK,
    least_tokens=1024,
    fixed_bytes=(32 << 20) + (16 << 20),
)
LIBRARY_FUNCTIONS: dict[str, LibraryFunction] = {
    "cublas.linear": CUBLAS,
    "cublas.linear_fp8": CUBLAS_FP8,
    "fa3.attention_prefill": FA3,
    "flashinfer.attention_prefill": FLASHINFER,
}


def library_of(key: str) -> str:
    """What people call the library of a function: `fa3` of `fa3.attention_prefill`."""
    return key.partition(".")[0]


_RELEASE = re.compile(r"v?(\d+(?:\.\d+)*)")
_BOUND = re.compile(r"(>=|<)(\d+(?:\.\d+)*)")


def in_versions(version: str, versions: str) -> bool:
    """Whether a release is within bounds such as `>=3.0,<3.1`; only its numbers are read."""
    found = _RELEASE.match(version)
    if found is None:
        return False
    release = _numbers(found[1])
    for relation, bound in _BOUND.findall(versions):
        is_older = release < _numbers(bound)
        if is_older == (relation == ">="):
            return False
    return True


def is_bounds(versions: str) -> bool:
    """Whether this is one or more bounds such as `>=3.0,<3.1`."""
    return all(_BOUND.fullmatch(bound) for bound in versions.split(","))


def _numbers(release: str) -> list[int]:
    """Its numbers without zeros at the end, so that 3.0 is 3."""
    numbers = [int(number) for number in release.split(".")]
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers


def computes_kernel(function: LibraryFunction, kernel: KernelSpec) -> bool:
    """Whether a function computes the parts of a kernel, whose rows are tokens."""
    if kernel.params[0].tensor.shape[:1] != ("num_tokens",):
        return False
    kinds = tuple(part.kind for part in kernel.parts)
    dtypes = {str(param.tensor.format) for param in kernel.tensors if param.role != "scratch"}
    return function.computes(kinds, kernel.parts[0].attrs, dtypes)


def operands_by_role(kernel: KernelSpec, kind: str) -> dict[str, str]:
    """For each operand of the first part of that kind, the parameter or value that it is."""
    part = next(part for part in kernel.parts if part.kind == kind)
    return dict(zip(OPS[kind].operands, part.operands, strict=True))
