"""`tokenspeed serve`: OpenAI's and Anthropic's APIs over HTTP."""

from __future__ import annotations

import signal
import socket
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tokenspeed_plan.planner.commands.engines import (
    VERIFY_HELP,
    Backend,
    EngineOptions,
    ReplayCommand,
    load_chat_template,
    load_tokenizer,
    on_all_ranks,
    rank_timeout_option,
    ready_engine,
    seconds_option,
)
from tokenspeed_plan.planner.commands.pools import (
    PoolOptions,
    other_pools,
    pool_options,
    serve_prefill,
)
from tokenspeed_plan.planner.commands.replicas import (
    RoutingOptions,
    launched,
    router_options,
    routing_options,
)
from tokenspeed_plan.planner.commands.sign import signature_options, wanted_signers
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.errors import RequestError

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.serving.http import ServerOptions

Folder = click.Path(path_type=Path)


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Options of `tokenspeed serve`: the address, the engine, the server, routing, pools."""

    host: str
    port: int
    engine: EngineOptions
    server: ServerOptions
    routing: RoutingOptions
    pools: PoolOptions


@click.command(cls=ReplayCommand)
@click.argument("bundle", type=Folder)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; without a key, one of this machine alone.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 takes a free one.",
)
@click.option(
    "--api-key",
    envvar="TOKENSPEED_API_KEY",
    show_envvar=True,
    help="What clients of /v1 must send.",
)
@click.option("--model-name", help="What clients call the model (default: the plan's name for it).")
@click.option(
    "--max-requests",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Choices in flight; more get 429.",
)
@click.option(
    "--max-body-bytes",
    type=click.IntRange(min=1),
    default=8 << 20,
    show_default=True,
    help="Largest request body; more gets 413.",
)
@seconds_option(
    "--body-timeout",
    "body_timeout_s",
    30.0,
    "Seconds within which a body must come; later gets 408.",
)
@click.option(
    "--drain",
    "drain_s",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Seconds that SIGTERM leaves to answers in flight.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="Open connections, fewer where `ulimit -n` is low; more get 503.",
)
@seconds_option(
    "--header-timeout",
    "header_timeout_s",
    10.0,
    "Seconds within which a request's header must come; later the connection is closed.",
)
@seconds_option(
    "--write-timeout",
    "write_timeout_s",
    30.0,
    "Seconds within which a client must read a part of its answer; later it is dropped.",
)
@seconds_option(
    "--stall",
    "stall_s",
    30.0,
    "Seconds after which /health fails if the engine has work and does not move.",
)
@click.option(
    "--drop-billing-header",
    "drops_billing",
    is_flag=True,
    help="Leave `x-anthropic-billing-header` out of prompts: it changes, and defeats the cache.",
)
@click.option("--weights", type=Folder, help="Checkpoint folder, where it is not the spec's.")
@click.option(
    "--backend", type=click.Choice(["reference", "kernels"]), help="As in `tokenspeed run`."
)
@rank_timeout_option
@routing_options
@click.option("--no-canary", is_flag=True, help="Do not replay the golden prompts first.")
@click.option("--verify-weights", is_flag=True, help=VERIFY_HELP)
@signature_options
@pool_options
def serve(
    bundle: Path,
    host: str,
    port: int,
    api_key: str | None,
    model_name: str | None,
    max_requests: int,
    max_body_bytes: int,
    body_timeout_s: float,
    drain_s: float,
    max_connections: int,
    header_timeout_s: float,
    write_timeout_s: float,
    stall_s: float,
    drops_billing: bool,
    weights: Path | None,
    backend: Backend | None,
    rank_timeout_s: float,
    no_canary: bool,
    verify_weights: bool,
    allowed_signers: Path | None,
    signer: str | None,
    routing: RoutingOptions,
    pools: PoolOptions,
) -> None:
    """Serve BUNDLE to OpenAI's and Anthropic's clients."""
    _check_packages()
    from tokenspeed_plan.runtime.serving.http import ServerOptions

    if api_key == "":
        raise RequestError("the API key is empty", "give one, or no `--api-key` at all")
    server = ServerOptions(
        api_key=api_key,
        model_name=model_name,
        max_requests=max_requests,
        max_body_bytes=max_body_bytes,
        body_timeout_s=body_timeout_s,
        drain_s=drain_s,
        max_connections=max_connections,
        header_timeout_s=header_timeout_s,
        write_timeout_s=write_timeout_s,
        stall_s=stall_s,
        own_host=host,
        drops_billing=drops_billing,
    )
    signers = wanted_signers(allowed_signers, signer)
    engine = EngineOptions(
        weights,
        backend,
        canary=not no_canary,
        verify_weights=verify_weights,
        signers=signers,
        rank_timeout_s=rank_timeout_s,
    )
    _serve_as(bundle, ServeOptions(host, port, engine, server, routing, pools))


def _serve_as(bundle: Path, options: ServeOptions) -> None:
    """As a pool for prompts, as several engines behind a router, or as one engine."""
    signals = (signal.SIGTERM, signal.SIGINT)
    if options.pools.role == "prefill":
        own = replace(options.engine, role="prefill")
        on_all_ranks(
            bundle, own, lambda: serve_prefill(bundle, own, options.pools), ignored=signals
        )
        return
    if options.routing.has_router:
        _serve_replicas(bundle, options)
        return
    on_all_ranks(bundle, options.engine, lambda: _serve(bundle, options), ignored=signals)


def _check_packages() -> None:
    packages = ("fastapi", "httpx", "prometheus_client", "uvicorn")
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise RequestError(
            f"serving needs {', '.join(missing)}",
            "install the extra `serve`: `pip install 'tokenspeed-plan[serve]'`",
        )


def _serve_replicas(bundle: Path, options: ServeOptions) -> None:
    """Start servers of this command, and route to them."""
    from tokenspeed_plan.runtime.serving.http import check_reach, listen
    from tokenspeed_plan.runtime.serving.router import serve_replicas

    with listen(options.host, options.port) as listener:
        check_reach(listener, options.server.api_key)
        frozen = load_plan(bundle, options.engine.signers)
        tokenizer = load_tokenizer(bundle, options.engine)
        ready = _ready_line(listener)
        with launched(bundle, frozen, options.engine, options.server, options.routing) as launch:
            router = router_options(frozen, options.server, launch)
            serve_replicas(router, tokenizer, listener, lambda: click.echo(ready, err=True))


def _ready_line(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if ":" in host:
        host = f"[{host}]"
    return f"ready at http://{host}:{port}/v1"


def _serve(bundle: Path, options: ServeOptions) -> None:
    from tokenspeed_plan.runtime.serving.http import check_reach, listen, serve
    from tokenspeed_plan.runtime.serving.kv_events import kv_events

    with listen(options.host, options.port) as listener:
        check_reach(listener, options.server.api_key)
        template = load_chat_template(bundle, options.engine)
        with other_pools(bundle, options.engine, options.pools) as attach:
            engine = ready_engine(bundle, options.engine, template)
            attach(engine)
            ready = _ready_line(listener)
            with kv_events(engine, options.routing.kv_events, options.routing.kv_topic):
                serve(engine, options.server, listener, lambda: click.echo(ready, err=True))
            engine.loop.close()
