"""The router as a process: it starts the replicas, serves, drains, and ends them."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from tokenspeed_plan.runtime.serving.http.body import BodyMemory
from tokenspeed_plan.runtime.serving.http.server import (
    DrainingServer,
    ServerOptions,
    http_config,
)
from tokenspeed_plan.runtime.serving.openai.conversion import RequestLimits
from tokenspeed_plan.runtime.serving.router.affinity import Affinity
from tokenspeed_plan.runtime.serving.router.fleet import Fleet, Launch
from tokenspeed_plan.runtime.serving.router.fleet_metrics import FleetMetrics
from tokenspeed_plan.runtime.serving.router.router_app import Router, make_router_app
from tokenspeed_plan.runtime.tokenizer import Tokenizer

_WORKERS = 2  # threads that tokenise prompts
_CONNECT_S = 5.0


@dataclass(frozen=True, slots=True)
class RouterOptions:
    """What the router knows of its replicas.

    Attributes:
        server: the options that each replica has, too.
        limits: of each replica.
        page_size: of their prefix caches, in tokens.
        num_pages: of each of them.
    """

    server: ServerOptions
    launch: Launch
    limits: RequestLimits
    page_size: int
    num_pages: int


def serve_replicas(
    options: RouterOptions,
    tokenizer: Tokenizer,
    listener: socket.socket,
    ready: Callable[[], None],
) -> None:
    """Serve until a signal comes and all requests are answered, or the drain is over.

    SIGHUP restarts one replica after the other. `ready` is called once all of them are up.

    Raises:
        RequestError: a replica cannot be started.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    with ThreadPoolExecutor(_WORKERS, "route") as workers:
        router = _router(options, tokenizer, workers)

        def begin() -> None:
            loop = asyncio.get_running_loop()
            tasks.append(loop.create_task(_say_ready(router.fleet, ready)))
            loop.add_signal_handler(signal.SIGHUP, restart)

        def restart() -> None:
            in_flight = router.affinity.in_flight
            work = router.fleet.restart_all(lambda replica: in_flight[replica])
            tasks.append(asyncio.get_running_loop().create_task(work))

        tasks: list[asyncio.Task[None]] = []
        config = http_config(make_router_app(router, begin))
        server = DrainingServer(config, router, options.server, listener, lambda: None)
        server.run([])
        server.last_resort.cancel()
    if router.fleet.error is not None:
        raise router.fleet.error


async def _say_ready(fleet: Fleet, ready: Callable[[], None]) -> None:
    await fleet.all_ready.wait()
    ready()


def _router(options: RouterOptions, tokenizer: Tokenizer, workers: ThreadPoolExecutor) -> Router:
    server, count = options.server, options.launch.count
    headers = {}
    if options.launch.key is not None:
        headers["Authorization"] = f"Bearer {options.launch.key}"
    client = httpx.AsyncClient(
        headers=headers,
        timeout=httpx.Timeout(None, connect=_CONNECT_S),
        limits=httpx.Limits(max_connections=None, keepalive_expiry=server.header_timeout_s / 2),
        trust_env=False,  # replicas are reached directly, whatever proxy the environment names
    )
    affinity = Affinity(count, options.page_size, options.num_pages)
    fleet = Fleet(options.launch, client, affinity.forget)
    return Router(
        fleet=fleet,
        affinity=affinity,
        client=client,
        metrics=FleetMetrics(fleet, client),
        tokenizer=tokenizer,
        limits=options.limits,
        api_key=server.api_key,
        own_host=server.own_host,
        page_size=options.page_size,
        drops_billing=server.drops_billing,
        bodies=BodyMemory(server.max_body_bytes, server.body_timeout_s),
        workers=workers,
    )
