"""The sum over ranks that is measured on a machine: kernels that push, as plans have them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenspeed_plan.codegen.build import Job, compile_all
from tokenspeed_plan.codegen.kernel_builder import Built, build_kernel
from tokenspeed_plan.planner.machines.hardware import HardwareSpec
from tokenspeed_plan.plans.canon import sha256
from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.peer_memory import MAX_PUSH_PROGRAMS
from tokenspeed_plan.plans.schema import Binary, KernelSpec, Param, Part
from tokenspeed_plan.plans.types import Attr, TensorSpec

EPS = 1e-6


def push_kernels(
    hidden: int, num_ranks: int, rows: Sequence[int], hardware: HardwareSpec
) -> tuple[Built, ...]:
    """Sum over the ranks, residual and norm as one kernel, for up to so many rows of bf16 each."""
    plain = _kernel(hidden, num_ranks)
    built = (
        build_kernel("reduce_add_norm", plain, (most, most), hardware, most <= MAX_PUSH_PROGRAMS)
        for most in rows
    )
    return tuple(first for first, *_ in built)


def compile_push_kernels(
    kernels: Sequence[Built], sm: int, cache: Path
) -> tuple[dict[str, Binary], dict[str, bytes]]:
    """Their binaries and the bytes of these, by name.

    Raises:
        PlanError: one does not compile.
    """
    jobs = {each.kernel.name: Job(each.kernel, each.source or "", sm) for each in kernels}
    made = compile_all(jobs.values(), cache)
    binaries, cubins = {}, {}
    for name, job in jobs.items():
        compiled = made[job.key]
        if compiled.error:
            raise PlanError(f"`{name}` does not compile: {compiled.error}", "check Triton")
        cubins[name] = compiled.cubin
        binaries[name] = Binary(
            kernel=name,
            sm=sm,
            cubin_sha256=sha256(compiled.cubin),
            registers=compiled.registers,
            spill_bytes=compiled.spill_bytes,
            shared_bytes=compiled.shared_bytes,
        )
    return binaries, cubins


def _kernel(hidden: int, num_ranks: int) -> KernelSpec:
    rows = TensorSpec.of(("num_tokens", hidden), "bf16")
    norm = TensorSpec.of((hidden,), "bf16")
    params = (
        Param(name="all_reduce_x", role="input", tensor=rows),
        Param(name="add_r", role="input", tensor=rows),
        Param(name="rms_norm_w", role="weight", tensor=norm),
        Param(name="add_y", role="output", tensor=rows, access="write"),
        Param(name="rms_norm_y", role="output", tensor=rows, access="write"),
    )
    ranks: dict[str, Attr] = {"num_ranks": num_ranks}
    parts = (
        Part(kind="all_reduce", operands=("all_reduce_x",), outputs=("sum",), attrs=ranks),
        Part(kind="add", operands=("sum", "add_r"), outputs=("add_y",), attrs={}),
        Part(
            kind="rms_norm",
            operands=("add_y", "rms_norm_w"),
            outputs=("rms_norm_y",),
            attrs={"eps": EPS},
        ),
    )
    return KernelSpec(name="", params=params, parts=parts)
