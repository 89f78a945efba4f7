"""Loads what an engine needs from a bundle or a plan: memory, executor and tokenizer."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.schema import Plan, Pool, PoolRole
from tokenspeed_plan.plans.signature import Signers
from tokenspeed_plan.plans.weight_digests import Depth, check_weight_files
from tokenspeed_plan.runtime.compare import ComparingBackend
from tokenspeed_plan.runtime.execution.backend import (
    Backend,
    BackendName,
    KernelBackend,
    ReferenceBackend,
    load_kernels,
)
from tokenspeed_plan.runtime.execution.executor import Executor, Lead
from tokenspeed_plan.runtime.execution.kernels import Kernels
from tokenspeed_plan.runtime.execution.launch import EagerLaunch, Launch
from tokenspeed_plan.runtime.execution.peer_arenas import PeerMemory
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory
from tokenspeed_plan.runtime.execution.rank_links import join
from tokenspeed_plan.runtime.libraries.loader import load_libraries
from tokenspeed_plan.runtime.loading.loading_report import Report, nobody
from tokenspeed_plan.runtime.loading.preflight import check_files, check_target, find_weights
from tokenspeed_plan.runtime.loading.rank_memory import RankMemory
from tokenspeed_plan.runtime.loading.weights import load_weights
from tokenspeed_plan.runtime.tokenizer import Tokenizer, WriteChat


@dataclass(frozen=True, slots=True)
class Loaded:
    """The parts of an engine; `startup_s` has the seconds of each step of loading."""

    plan: Plan
    executor: Executor
    tokenizer: Tokenizer | None
    startup_s: dict[str, float] = field(default_factory=dict)


def load_bundle(
    bundle: Path,
    weights: Path | None = None,
    chat: WriteChat | Tokenizer | None = None,
    backend: BackendName | None = None,
    launch: Launch | None = None,
    lead: Lead | None = None,
    depth: Depth = "headers",
    signers: Signers | None = None,
    role: PoolRole | None = None,
    report: Report = nobody,
) -> Loaded:
    """Read and check a bundle, then its weights, then allocate; see `Engine.load`.

    Raises:
        PlanError: the bundle, this machine or the checkpoint does not fit.
    """
    begun = time.perf_counter()
    plan = load_plan(bundle, signers)
    folder = find_weights(plan, bundle, weights)
    check_weight_files(plan, folder, depth)
    read = time.perf_counter()
    name = backend or default_backend(plan)
    kernels = None if name == "reference" else load_kernels(plan, bundle)
    compare = name == "compare"
    loaded = load_parts(plan, folder, chat, kernels, launch, lead, compare, role, report)
    loaded.startup_s["read_plan_s"] = read - begun
    loaded.startup_s["read_weights_s"] = time.perf_counter() - read
    return loaded


def load_parts(
    plan: Plan,
    folder: Path,
    chat: WriteChat | Tokenizer | None = None,
    kernels: Kernels | None = None,
    launch: Launch | None = None,
    lead: Lead | None = None,
    compare: bool = False,
    role: PoolRole | None = None,
    report: Report = nobody,
) -> Loaded:
    """Load from a plan that is already checked, with its weights in `folder`.

    Raises:
        PlanError: this machine or the checkpoint does not fit, or there is no such pool.
    """
    plan = plan.view(pool_of(plan, role))
    check_target(plan)
    check_files(plan, folder)
    links = join(plan)
    allocations = RankMemory(plan, links)
    arenas, tensors = load_weights(plan, folder, allocations.allocate, links.rank, report)
    reference = ReferenceBackend(plan, links.rank, links.collectives)
    backend = make_backend(plan, reference, kernels, compare, allocations.peers)
    if launch is None:
        launch = EagerLaunch() if compare else default_launch(plan)
    memory = PlanMemory(plan, arenas, tensors)
    tokenizer = None
    if isinstance(chat, Tokenizer):
        tokenizer = chat
    elif (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.load(folder, chat)
    return Loaded(plan, Executor(memory, backend, launch, lead), tokenizer)


def pool_of(plan: Plan, role: PoolRole | None) -> Pool:
    """The pool of a role; without one, the pool that answers.

    Raises:
        PlanError: there is none.
    """
    if role is None:
        return plan.pool
    for pool in plan.pools:
        if pool.role == role:
            return pool
    raise PlanError(
        f"the plan has no pool of role `{role}`",
        "plan with `disaggregation: {prefill: 1, decode: 1}`, or start it without `--pool`",
    )


def make_backend(
    plan: Plan,
    reference: ReferenceBackend,
    kernels: Kernels | None,
    compare: bool = False,
    peers: PeerMemory | None = None,
) -> Backend:
    """The references alone, the kernels and libraries, or both compared."""
    if kernels is None:
        return reference
    libraries = load_libraries(plan, reference)
    if compare:
        both = KernelBackend(plan, kernels, reference, peers=peers, libraries=libraries)
        return ComparingBackend(plan, both)
    full_size = plan.target.device == "cuda"
    return KernelBackend(plan, kernels, reference, full_size, peers, libraries)


def default_backend(plan: Plan) -> BackendName:
    """The kernels on a GPU, the references on a CPU."""
    return "reference" if plan.target.device == "cpu" else "kernels"


def default_launch(plan: Plan) -> Launch:
    """CUDA graphs on a GPU, step by step on a CPU."""
    if plan.target.device == "cpu":
        return EagerLaunch()
    from tokenspeed_plan.runtime.execution.graphs import GraphLaunch

    return GraphLaunch()
