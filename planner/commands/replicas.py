"""`tokenspeed serve --replicas`: engines behind a router, on this host or, by Ray, on a cluster."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokenspeed_plan.planner.commands.engines import ARGS, EngineOptions
from tokenspeed_plan.planner.commands.rank_processes import child_environment, own_command
from tokenspeed_plan.plans.schema import Plan

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.serving.http import ServerOptions
    from tokenspeed_plan.runtime.serving.router import Launch, RouterOptions

_VISIBLE = "CUDA_VISIBLE_DEVICES"
# The last of equal options counts: the rest of the command stays as the user has written it.
_OF_A_REPLICA = ("--host", "127.0.0.1", "--port", "0", "--replicas", "1")


@dataclass(frozen=True, slots=True)
class RoutingOptions:
    """How requests come to engines.

    Attributes:
        replicas: engines behind the address.
        ray: the address of a cluster that runs them; None for this host.
        kv_events: where the engine publishes what its prefix cache holds; None for nowhere.
        kv_topic: of these messages.
    """

    replicas: int = 1
    ray: str | None = None
    kv_events: str | None = None
    kv_topic: str = ""

    @property
    def has_router(self) -> bool:
        """Whether this process routes, and has no engine itself."""
        return self.replicas > 1 or self.ray is not None


def routing_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of replicas and of routers; the command gets them as one, `routing`."""

    @functools.wraps(command)
    def with_routing(
        *args: Any,
        replicas: int,
        ray: str | None,
        kv_events: str | None,
        kv_topic: str,
        **others: Any,
    ) -> None:
        routing = RoutingOptions(replicas, ray, kv_events, kv_topic)
        if kv_events and routing.has_router:
            raise click.UsageError("--kv-events is for one engine, whose address a gateway knows")
        command(*args, routing=routing, **others)

    options = (
        click.option(
            "--replicas",
            type=click.IntRange(1, 64),
            default=1,
            show_default=True,
            help="Engines behind the address; a session stays with one of them.",
        ),
        click.option(
            "--ray",
            metavar="ADDRESS",
            help="Let Ray place the replicas: the address of a cluster, or `auto`.",
        ),
        click.option(
            "--kv-events",
            metavar="ENDPOINT",
            help="Publish the prefix cache's pages as vLLM does (ZeroMQ); `>ENDPOINT` connects.",
        ),
        click.option("--kv-topic", default="", help="With --kv-events: topic of its messages."),
    )
    for option in reversed(options):
        with_routing = option(with_routing)
    return with_routing


@contextmanager
def launched(
    bundle: Path,
    frozen: Plan,
    engine: EngineOptions,
    server: ServerOptions,
    routing: RoutingOptions,
) -> Iterator[Launch]:
    """How the replicas of a plan are started.

    Raises:
        RequestError: Ray is missing or has no room for them.
    """
    if routing.ray is None:
        yield _launch_here(frozen, routing.replicas, server)
        return
    from tokenspeed_plan.planner.commands.ray_replicas import launched_on_ray

    with launched_on_ray(bundle, frozen, engine, server, routing.ray, routing.replicas) as launch:
        yield launch


def _launch_here(frozen: Plan, count: int, server: ServerOptions) -> Launch:
    """Each is this command on a port of its own, with as many GPUs as the plan has ranks."""
    from tokenspeed_plan.runtime.serving.router import Launch, on_this_host

    args: tuple[str, ...] = click.get_current_context().meta[ARGS]
    environments = [child_environment() | _devices(frozen, replica) for replica in range(count)]
    start = on_this_host(own_command([*args, *_OF_A_REPLICA]), environments)
    return Launch(count, start, server.drain_s, server.api_key)


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
    return RouterOptions(server, launch, request_limits, limits.page_size, limits.num_pages)
