"""Formats that some kernel or reference body computes in."""

from __future__ import annotations

from tokenspeed_plan.plans.fp8_format import FP8_ROWS
from tokenspeed_plan.plans.ops import OPS
from tokenspeed_plan.plans.schema import KernelSpec, Plan, Pool
from tokenspeed_plan.plans.types import FORMATS, DType, Format
from tokenspeed_plan.plans.validate.refusal import refuse

FP8_KEYS = Format(dtype="fp8")
_KEYS = (("kv_write", "kv_cache"), ("attention", "kv_cache"))
COMPUTED: tuple[DType, ...] = ("bf16", "fp32", "fp64", "i32", "i64")
# Formats in which the matrix of a product may be stored, and operators with such a matrix `w`.
_MATRICES = (FORMATS["fp8"], FORMATS["nvfp4"])
_PRODUCTS = ("linear", "experts_up", "experts_down", "grouped_up", "grouped_down")


def check_formats(plan: Plan, pool: Pool) -> None:
    """No tensor has a format that nothing computes in.

    Matrices of products may be `fp8[128x128]:fp32` or `fp4[1x16]:fp8:fp32`, what they multiply
    `fp8[1x128]:fp32`, keys and values `fp8`; all else has plain elements.

    Raises:
        PlanError: one has another.
    """
    for weight in pool.weights:
        if weight.tensor.format not in _MATRICES:
            _check(f"weight `{weight.name}`", weight.tensor.format)
    buffers = list(pool.buffers)
    for program in pool.programs:
        buffers += program.buffers
    for buffer in buffers:
        if buffer.arena == "kv_cache" and buffer.tensor.format == FP8_KEYS:
            continue
        if buffer.tensor.format == FP8_ROWS and buffer.arena == "activations":
            continue
        _check(f"buffer `{buffer.name}`", buffer.tensor.format)
    for kernel in plan.kernels:
        _check_params(kernel)


def _check_params(kernel: KernelSpec) -> None:
    """Of other formats are matrices of products, what they multiply, and keys and values."""
    for param in kernel.params:
        is_cache = param.role == "state" and _has_role(kernel, param.name, _KEYS)
        if param.tensor.format == FP8_KEYS and is_cache:
            continue
        if param.tensor.format == FP8_ROWS and param.role in ("input", "output"):
            continue  # the shape rules let only products read it, and `quantise` make it
        is_matrix = param.role == "weight" and _is_matrix(kernel, param.name)
        if param.tensor.format not in _MATRICES or not is_matrix:
            _check(f"parameter `{param.name}` of `{kernel.name}`", param.tensor.format)


def _is_matrix(kernel: KernelSpec, name: str) -> bool:
    """Whether all parts that read a parameter read it as the `w` of a product."""
    return _has_role(kernel, name, tuple((kind, "w") for kind in _PRODUCTS))


def _has_role(kernel: KernelSpec, name: str, roles: tuple[tuple[str, str], ...]) -> bool:
    """Whether all parts that read a parameter read it as one of these operands of an operator."""
    for part in kernel.parts:
        for index, operand in enumerate(part.operands):
            if operand == name and (part.kind, OPS[part.kind].operands[index]) not in roles:
                return False
    return True


def _check(what: str, used: Format) -> None:
    computed = used.dtype in COMPUTED and not used.block
    if not computed:
        known = ", ".join(COMPUTED)
        matrices = " or ".join(map(str, _MATRICES))
        raise refuse(
            f"{what} is {used}; kernels and bodies compute in {known}, "
            f"and read matrices of products in {matrices}, keys and values in fp8"
        )
