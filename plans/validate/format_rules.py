"""Formats that some kernel or reference body computes in."""

from __future__ import annotations

from tokenspeed_plan.plans.fp8_format import FP8, FP8_ROWS
from tokenspeed_plan.plans.ops import OPS
from tokenspeed_plan.plans.schema import KernelSpec, Plan, Pool
from tokenspeed_plan.plans.types import DType, Format
from tokenspeed_plan.plans.validate.refusal import refuse

COMPUTED: tuple[DType, ...] = ("bf16", "fp32", "fp64", "i32", "i64")
# Operators whose weight `w` may be in blocks of FP8.
_READ_FP8 = ("linear", "experts_up", "experts_down", "grouped_up", "grouped_down")


def check_formats(plan: Plan, pool: Pool) -> None:
    """No tensor has a format that nothing computes in.

    Matrices of products may be `fp8[128x128]:fp32`, and what they multiply `fp8[1x128]:fp32`; all
    else has plain elements.

    Raises:
        PlanError: one has another, such as `fp4[1x16]:fp8`.
    """
    for weight in pool.weights:
        if weight.tensor.format != FP8:
            _check(f"weight `{weight.name}`", weight.tensor.format)
    buffers = list(pool.buffers)
    for program in pool.programs:
        buffers += program.buffers
    for buffer in buffers:
        if buffer.tensor.format == FP8_ROWS and buffer.arena == "activations":
            continue
        _check(f"buffer `{buffer.name}`", buffer.tensor.format)
    for kernel in plan.kernels:
        _check_params(kernel)


def _check_params(kernel: KernelSpec) -> None:
    """A parameter in FP8 is the matrix of products, or what one multiplies, and nothing else."""
    for param in kernel.params:
        if param.tensor.format == FP8_ROWS and param.role in ("input", "output"):
            continue  # the shape rules let only products read it, and `quantise` make it
        is_matrix = param.role == "weight" and _is_matrix(kernel, param.name)
        if param.tensor.format != FP8 or not is_matrix:
            _check(f"parameter `{param.name}` of `{kernel.name}`", param.tensor.format)


def _is_matrix(kernel: KernelSpec, name: str) -> bool:
    """Whether all parts that read a parameter read it as the `w` of a product."""
    for part in kernel.parts:
        for index, operand in enumerate(part.operands):
            if operand != name:
                continue
            if part.kind not in _READ_FP8 or OPS[part.kind].operands[index : index + 1] != ("w",):
                return False
    return True


def _check(what: str, used: Format) -> None:
    computed = used.dtype in COMPUTED and not used.block
    if not computed:
        known = ", ".join(COMPUTED)
        raise refuse(
            f"{what} is {used}; kernels and bodies compute in {known}, "
            f"and read matrices of products in {FP8}"
        )
