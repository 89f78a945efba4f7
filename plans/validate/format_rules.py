"""Formats that some kernel or reference body computes in."""

from __future__ import annotations

from tokenspeed_plan.plans.schema import Plan, Pool
from tokenspeed_plan.plans.types import DType, Format
from tokenspeed_plan.plans.validate.refusal import refuse

COMPUTED: tuple[DType, ...] = ("bf16", "fp32", "fp64", "i32", "i64")


def check_formats(plan: Plan, pool: Pool) -> None:
    """No tensor has a format that nothing computes in.

    Raises:
        PlanError: one has, such as `fp8[128x128]:fp32`.
    """
    for weight in pool.weights:
        _check(f"weight `{weight.name}`", weight.tensor.format)
    buffers = list(pool.buffers)
    for program in pool.programs:
        buffers += program.buffers
    for buffer in buffers:
        _check(f"buffer `{buffer.name}`", buffer.tensor.format)
    for kernel in plan.kernels:
        for param in kernel.params:
            what = f"parameter `{param.name}` of `{kernel.name}`"
            _check(what, param.tensor.format)


def _check(what: str, used: Format) -> None:
    computed = used.dtype in COMPUTED and not used.block
    if not computed:
        known = ", ".join(COMPUTED)
        raise refuse(f"{what} is {used}; kernels and bodies compute in {known}")
