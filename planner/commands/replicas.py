"""How `tokenspeed serve --replicas` starts its engines: this command, each on a port of its own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from tokenspeed_plan.planner.commands.engines import ARGS
from tokenspeed_plan.planner.commands.rank_processes import child_environment, own_command
from tokenspeed_plan.plans.schema import Plan

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.serving.http import ServerOptions
    from tokenspeed_plan.runtime.serving.router import Launch, RouterOptions

_VISIBLE = "CUDA_VISIBLE_DEVICES"
# The last of equal options counts: the rest of the command stays as the user has written it.
_OF_A_REPLICA = ("--host", "127.0.0.1", "--port", "0", "--replicas", "1")


def launch_of(frozen: Plan, count: int, drain_s: float) -> Launch:
    """How the replicas of a plan are started; each has as many GPUs as the plan has ranks."""
    from tokenspeed_plan.runtime.serving.router import Launch

    args: tuple[str, ...] = click.get_current_context().meta[ARGS]
    environments = [child_environment() | _devices(frozen, replica) for replica in range(count)]
    return Launch(count, own_command([*args, *_OF_A_REPLICA]), environments, drain_s)


def _devices(frozen: Plan, replica: int) -> dict[str, str]:
    """The GPUs of a replica, of those that this process may use."""
    if frozen.target.device == "cpu":
        return {}
    num_gpus = frozen.target.count
    own = range(replica * num_gpus, (replica + 1) * num_gpus)
    names = list(map(str, own))
    if os.environ.get(_VISIBLE):
        visible = os.environ[_VISIBLE].split(",")
        names = [visible[number] for number in own if number < len(visible)]
    return {_VISIBLE: ",".join(names)}


def router_options(frozen: Plan, server: ServerOptions, launch: Launch) -> RouterOptions:
    """What the router knows of a plan."""
    from tokenspeed_plan.runtime.serving.openai.conversion import RequestLimits
    from tokenspeed_plan.runtime.serving.router import RouterOptions

    limits = frozen.pool.limits
    request_limits = RequestLimits(
        limits.max_seq_len, limits.default_max_tokens, frozen.model.vocab_size
    )
    model = server.model_name or frozen.model.name
    return RouterOptions(server, launch, model, request_limits, limits.page_size, limits.num_pages)
