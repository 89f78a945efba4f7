"""An executor to measure: the kernels of a plan, with weights of a checkpoint or random ones."""

from __future__ import annotations

from pathlib import Path

import torch

from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.execution.backend import (
    Backend,
    KernelBackend,
    ReferenceBackend,
    load_kernels,
)
from tokenspeed_plan.runtime.execution.executor import Executor, Lead
from tokenspeed_plan.runtime.execution.launch import Launch
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory
from tokenspeed_plan.runtime.execution.rank_links import Links, join
from tokenspeed_plan.runtime.libraries.loader import load_libraries
from tokenspeed_plan.runtime.loading.preflight import check_files, check_target
from tokenspeed_plan.runtime.loading.rank_memory import RankMemory
from tokenspeed_plan.runtime.loading.weights import load_weights, random_weights

_ROWS_AT_ONCE = 64  # pages or state slots that are filled


def prepare(
    plan: Plan,
    bundle: Path,
    folder: Path | None,
    launch: Launch | None = None,
    lead: Lead | None = None,
    links: Links | None = None,
) -> Executor:
    """Check, allocate and fill. States and pages are random, as if sequences had run before.

    Of several ranks each prepares its own; it joins the others unless it is given links to them.

    Raises:
        PlanError: the bundle, this machine or the checkpoint does not fit.
    """
    check_target(plan)
    links = links or join(plan)
    allocations = RankMemory(plan, links)
    kernels = load_kernels(plan, bundle) if plan.target.device == "cuda" else None
    if folder is None:
        arenas = allocations.allocate()
        weights = random_weights(plan, arenas)
    else:
        check_files(plan, folder)
        arenas, weights = load_weights(plan, folder, allocations.allocate, links.rank)
    for buffer in plan.pool.buffers:
        if buffer.arena in ("kv_cache", "state"):
            view = arenas.view(
                buffer.arena, buffer.offset_bytes, buffer.tensor.bind(0, 0), buffer.tensor.dtype
            )
            for rows in view[1:].split(_ROWS_AT_ONCE):  # FP8 has no random numbers of its own
                rows.copy_(torch.empty(rows.shape, device=rows.device).normal_(std=0.1))
    reference = ReferenceBackend(plan, links.rank, links.collectives)
    backend: Backend = reference
    if kernels is not None:
        full_size = launch is not None
        libraries = load_libraries(plan, reference)
        backend = KernelBackend(plan, kernels, reference, full_size, allocations.peers, libraries)
    return Executor(PlanMemory(plan, arenas, weights), backend, launch, lead)
