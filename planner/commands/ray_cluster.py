"""A Ray cluster as batches and servers use it: places for engines, plans that travel by digest.

A place is on one node (`STRICT_PACK`), with as many GPUs as a plan has ranks, or with a CPU. What
runs there is a command of ours as its user has written it, with paths that hold on every node.
"""

# Ray is of an extra that not every checkout has.
# pyright: reportMissingImports=false

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from tokenspeed_plan.planner.commands.ray_actor import SentPlan
from tokenspeed_plan.plans.bundle import CUBIN, PLAN_FILE
from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.plans.kernel_file import KERNELS
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.plans.signature import SIGNATURE_FILE

_A_BIT = 0.001  # of a resource that only says what a node is
# For how long Ray waits for processes of its own, in its own units. On a busy machine they take
# longer than Ray's half a minute, and a node whose agent is late ends again.
_PATIENCE = {
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_register_timeout_seconds": "300",
}
_GIVEN = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
Resources = dict[str, float]


def be_patient() -> None:
    """Let a cluster that this process begins take its time to come up.

    Ray reads this when it is imported. What its user has set stays.
    """
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)


@contextmanager
def cluster(address: str) -> Iterator[None]:
    """Join a cluster; `auto` begins a local one where none runs.

    Raises:
        RequestError: Ray is missing, or there is no cluster.
    """
    if find_spec("ray") is None:
        raise RequestError(
            "`--ray` needs Ray",
            "install the extra `cluster`: `pip install 'tokenspeed-plan[cluster]'`",
        )
    be_patient()
    import ray

    quiet: Any = {"log_to_driver": False, "logging_level": "error"}
    try:
        ray.init(address, **quiet)
    except ConnectionError as error:
        if address != "auto":
            raise RequestError(
                f"there is no Ray cluster at `{address}`", "`--ray auto` begins a local one"
            ) from error
        ray.init(include_dashboard=False, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def resources_of(frozen: Plan, kind: str | None = None) -> Resources:
    """What an engine of a plan takes of its node.

    Nodes with GPUs say which: they have a resource `accelerator_type:H200`. `kind` names it, or any
    resource that tells the nodes of a plan from others.

    Raises:
        RequestError: no node is of the kind.
    """
    import ray

    resources: Resources = {"CPU": 1}
    if frozen.target.device == "cuda":
        resources["GPU"] = frozen.target.count
    wanted = kind or frozen.target.gpu
    total = ray.cluster_resources()
    names = [name for name in (f"accelerator_type:{wanted}", wanted) if name in total]
    if names:
        resources[names[0]] = _A_BIT
    elif kind is not None:
        raise RequestError(
            f"no node of the cluster is of the kind `{kind}`",
            "start one with it: `ray start --resources '{\"" + kind + "\": 1}'`",
        )
    return resources


def room_for(resources: Resources) -> int:
    """For how many engines there is room; each is on one node."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(
        int(min(node.get(name, 0.0) // share for name, share in resources.items()))
        for node in nodes
    )


def no_room(frozen: Plan, resources: Resources, found: int) -> RequestError:
    """The error where a cluster has too few places."""
    return RequestError(
        f"the cluster has room for {found} engines, each with {resources}",
        f"add a node with {frozen.target.count} x {frozen.target.gpu}",
    )


def place_for(resources: Resources) -> Any:
    """A place on one node; Ray finds another one where that node is lost."""
    from ray.util.placement_group import placement_group

    return placement_group([resources], strategy="STRICT_PACK")


def start_at(place: Any, resources: Resources, actor: type, **options: Any) -> Any:
    """Start an actor at a place."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return (
        ray.remote(actor)
        .options(
            num_cpus=1,
            num_gpus=resources.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(place),
            **options,
        )
        .remote()
    )


def words_given(but: Collection[str]) -> list[str]:
    """The options of the running command that its user has given, but for some.

    Paths are whole: on a node the command runs in another folder.
    """
    context = click.get_current_context()
    words: list[str] = []
    for option in context.command.params:
        name = option.name or ""
        is_given = context.get_parameter_source(name) in _GIVEN
        if not isinstance(option, click.Option) or name in but or not is_given:
            continue
        value, flag = context.params[name], max(option.opts, key=len)
        if option.is_flag:
            words += [flag] * bool(value)
            continue
        if isinstance(value, Path):
            value = value.absolute()
        words += [flag, str(value)]
    return words


def pack(bundle: Path, frozen: Plan) -> SentPlan:
    """The files of a bundle."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", encoding="utf-8") as archive:
        for name in (PLAN_FILE, SIGNATURE_FILE, KERNELS, CUBIN):
            if (bundle / name).exists():
                archive.add(bundle / name, name)
    return SentPlan(frozen.digest, str(bundle.resolve()), buffer.getvalue(), PLAN_FILE)
