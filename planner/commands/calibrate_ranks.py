"""Of `tokenspeed calibrate`: what several GPUs of this machine need to add up and to gather.

Each is measured by a process of its own, as ranks of a plan are: this one starts the others with
the same command, and they measure with it and end.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from tokenspeed_plan.codegen.build import default_cache
from tokenspeed_plan.planner.advisor import calibration
from tokenspeed_plan.planner.advisor.sum_probe import compile_push_kernels, push_kernels
from tokenspeed_plan.planner.commands.engines import ARGS
from tokenspeed_plan.planner.commands.rank_processes import started_ranks
from tokenspeed_plan.planner.machines.hardware import Profile, to_hardware
from tokenspeed_plan.plans.peer_memory import MAX_PUSH_PROGRAMS

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.bench.rank_sums import RankTimes

COUNTS = (2, 4, 8)
HIDDEN = 4096
CHUNK = 8192  # rows of the largest sum


def is_rank() -> bool:
    """Whether `tokenspeed calibrate` has started this process to measure with it."""
    return {"WORLD_SIZE", "RANK"} <= os.environ.keys()


def with_rank_sums(profile: Profile) -> Profile:
    """The profile with the sums and concatenations that this machine's GPUs were measured at."""
    from tokenspeed_plan.runtime.bench.machine import num_gpus

    args: tuple[str, ...] = click.get_current_context().meta[ARGS]
    times: dict[int, RankTimes] = {}
    for count in (count for count in COUNTS if count <= num_gpus()):
        click.echo(f"measuring sums of {count} GPUs", err=True)
        with started_ranks(count, args):
            times[count] = measure_rank(profile)
    if not times:
        return profile
    tables = {
        "push": {count: each.push for count, each in times.items()},
        "library": {count: each.library for count, each in times.items()},
        "gather": {count: each.gather for count, each in times.items()},
    }
    text = (
        f"`tokenspeed calibrate`: rows of {HIDDEN} in bf16 on {', '.join(map(str, times))} GPUs, "
        "in a CUDA graph, one call after the other: our kernel with residual and norm in it, NCCL"
    )
    return calibration.with_tables(profile, "ranks", tables, text)


def measure_rank(profile: Profile) -> RankTimes:
    """The times of this rank; all ranks call it at once."""
    from tokenspeed_plan.runtime.bench.machine import release
    from tokenspeed_plan.runtime.bench.rank_sums import Sums
    from tokenspeed_plan.runtime.execution.cuda_kernels import CudaKernels
    from tokenspeed_plan.runtime.execution.rank_links import join_to_measure
    from tokenspeed_plan.runtime.execution.rank_place import world_size

    links = join_to_measure("cuda")
    hardware = to_hardware(profile)
    built = push_kernels(HIDDEN, world_size(), (MAX_PUSH_PROGRAMS, CHUNK), hardware)
    binaries, cubins = compile_push_kernels(built, hardware.sm, default_cache())
    few, many = (each.kernel for each in built)
    specs = {MAX_PUSH_PROGRAMS: few, CHUNK: many}
    times = Sums(links, "cuda", CudaKernels(binaries, cubins), specs).times()
    links.meet()
    release()
    return times
