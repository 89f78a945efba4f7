"""Several programs of one or more plans with one load of random weights, kernel by kernel.

    python benchmarks/steps.py DIR [DIR ...] [--batches 1,8,32,128] [--prefill 8192]
        [--context 1024] [--kernels 14]

Plans that need the same memory share it, so that two ways to build a program are compared within
seconds of each other. Figures are printed as they come, a program at a time.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.bench.machine import Machine, measure_machine
from tokenspeed_plan.runtime.bench.prepare import prepare
from tokenspeed_plan.runtime.bench.replay import Replay
from tokenspeed_plan.runtime.bench.table import _program
from tokenspeed_plan.runtime.execution.backend import KernelBackend, ReferenceBackend, load_kernels
from tokenspeed_plan.runtime.execution.executor import Executor
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory
from tokenspeed_plan.runtime.libraries.loader import load_libraries

HEAD_LINES = 3  # of a program's table
STATES = ("kv_cache", "state")  # arenas whose contents outlive a program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--prefill", type=int, default=0, help="tokens of one prompt")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--kernels", type=int, default=14, help="the most that are printed")
    options = parser.parse_args()
    begun = time.perf_counter()
    machine = measure_machine("cuda")
    executors = executors_of(options.bundles)
    print(
        f"{machine.name}: reads {machine.read_bytes_per_s / 1e12:.3f} TB/s, "
        f"{machine.matrix_flops_per_s / 1e12:.0f} TFLOP/s; ready in "
        f"{time.perf_counter() - begun:.1f} s",
        flush=True,
    )
    for batch in filter(None, options.batches.split(",")):
        for bundle, executor in executors.items():
            shape = (int(batch), 1, options.context)
            show(bundle, executor, machine, ("decode", *shape), options.kernels)
    if options.prefill:
        for bundle, executor in executors.items():
            shape = (1, options.prefill, options.prefill)
            show(bundle, executor, machine, ("prefill", *shape), options.kernels)


def executors_of(bundles: list[Path]) -> dict[Path, Executor]:
    """An executor of each plan; all of them have the memory of the first one.

    Raises:
        PlanError: the plans have other weights or states.
    """
    plans = {bundle: load_plan(bundle) for bundle in bundles}
    first, *others = plans.values()
    for plan in others:
        if states_of(plan) != states_of(first):
            raise PlanError("the plans have other weights or states", "measure them apart")
    made: dict[Path, Executor] = {}
    for bundle, plan in plans.items():
        if made:
            made[bundle] = beside(made[bundles[0]], plan, bundle)
        else:
            made[bundle] = prepare(roomy(first, others), bundle, None)
    return made


def states_of(plan: Plan) -> tuple[Any, ...]:
    """The weights of a plan, and where its states lie."""
    return plan.pool.weights, [b for b in plan.pool.buffers if b.arena in STATES]


def roomy(plan: Plan, others: list[Plan]) -> Plan:
    """The plan with arenas that are large enough for others, too."""
    sizes: dict[str, int] = {}
    for each in (plan, *others):
        for arena in each.pool.arenas:
            sizes[arena.name] = max(sizes.get(arena.name, 0), arena.size_bytes)
    arenas = tuple(
        arena.model_copy(update={"size_bytes": sizes[arena.name]}) for arena in plan.pool.arenas
    )
    return plan.model_copy(update={"pools": (plan.pool.model_copy(update={"arenas": arenas}),)})


def beside(first: Executor, plan: Plan, bundle: Path) -> Executor:
    """An executor of a plan in the memory of another one."""
    memory = first.memory
    reference = ReferenceBackend(plan)
    backend = KernelBackend(
        plan, load_kernels(plan, bundle), reference, False, None, load_libraries(plan, reference)
    )
    return Executor(PlanMemory(plan, memory._arenas, memory._weights), backend)


@torch.inference_mode()
def show(
    bundle: Path, executor: Executor, machine: Machine, shape: tuple[Any, ...], most: int
) -> None:
    """Print a program's time and its slowest kernels."""
    executor.memory.arena("scratch").zero_()  # another plan has its counters elsewhere
    replay = Replay(executor.plan, executor, *shape)
    lines = _program(replay.measure(machine))
    print(f"\n{bundle.name}: " + "\n".join(lines[: HEAD_LINES + most]), flush=True)


if __name__ == "__main__":
    main()
