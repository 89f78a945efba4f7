"""`tokenspeed serve`: OpenAI's and Anthropic's APIs over HTTP."""

from __future__ import annotations

import functools
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokenspeed_plan.planner.commands.engines import (
    EngineOptions,
    ReplayCommand,
    engine_options,
    load_chat_template,
    load_tokenizer,
    on_all_ranks,
    rank_timeout_option,
    ready_engine,
    taken_from,
)
from tokenspeed_plan.planner.commands.note_run import noted
from tokenspeed_plan.planner.commands.option_types import MAX_SECONDS, Number, seconds_option
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
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.errors import RequestError

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.serving.http import ServerOptions

Folder = click.Path(path_type=Path)


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Options of `tokenspeed serve`: the engine, the server and its port, routing, pools."""

    port: int
    engine: EngineOptions
    server: ServerOptions
    routing: RoutingOptions
    pools: PoolOptions


_SERVER_OPTIONS = (
    click.option(
        "--host",
        default="127.0.0.1",
        show_default=True,
        help="Address to listen on; without a key, one of this machine alone.",
    ),
    click.option(
        "--api-key",
        envvar="TOKENSPEED_API_KEY",
        show_envvar=True,
        help="What clients of /v1 must send.",
    ),
    click.option(
        "--model-name", help="What clients call the model (default: the plan's name for it)."
    ),
    click.option(
        "--max-requests",
        type=click.IntRange(min=1),
        default=256,
        show_default=True,
        help="Choices in flight; more get 429.",
    ),
    click.option(
        "--max-body-bytes",
        type=click.IntRange(min=1),
        default=8 << 20,
        show_default=True,
        help="Largest request body; more gets 413.",
    ),
    seconds_option(
        "--body-timeout",
        "body_timeout_s",
        30.0,
        "Seconds within which a body must come; later gets 408.",
    ),
    click.option(
        "--drain",
        "drain_s",
        type=Number(0, MAX_SECONDS),
        default=30.0,
        show_default=True,
        help="Seconds that SIGTERM leaves to answers in flight.",
    ),
    click.option(
        "--max-connections",
        type=click.IntRange(min=1),
        default=1024,
        show_default=True,
        help="Open connections, fewer where `ulimit -n` is low; more get 503.",
    ),
    seconds_option(
        "--header-timeout",
        "header_timeout_s",
        10.0,
        "Seconds within which a request's header must come; later the connection is closed.",
    ),
    seconds_option(
        "--write-timeout",
        "write_timeout_s",
        30.0,
        "Seconds within which a client must read a part of its answer; later it is dropped.",
    ),
    seconds_option(
        "--stall",
        "stall_s",
        30.0,
        "Seconds after which /health fails if the engine has work and does not move.",
    ),
    click.option(
        "--drop-billing-header",
        "drops_billing",
        is_flag=True,
        help="Leave `x-anthropic-billing-header` out of prompts: it changes, and defeats the"
        " cache.",
    ),
)


def server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of the server; the command gets them as one, `server`."""

    @functools.wraps(command)
    def with_server(*args: Any, host: str, **others: Any) -> None:
        _check_packages()
        from tokenspeed_plan.runtime.serving.http import ServerOptions

        server = ServerOptions(own_host=host, **taken_from(others, ServerOptions))
        if server.api_key == "":
            raise RequestError("the API key is empty", "give one, or no `--api-key` at all")
        command(*args, server=server, **others)

    for option in reversed(_SERVER_OPTIONS):
        with_server = option(with_server)
    return with_server


@click.command(cls=ReplayCommand)
@click.argument("bundle", type=Folder)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 takes a free one.",
)
@server_options
@engine_options
@rank_timeout_option
@routing_options
@pool_options
def serve(
    bundle: Path,
    port: int,
    server: ServerOptions,
    engine: EngineOptions,
    routing: RoutingOptions,
    pools: PoolOptions,
) -> None:
    """Serve BUNDLE to OpenAI's and Anthropic's clients."""
    options = ServeOptions(port, engine, server, routing, pools)
    signals = (signal.SIGTERM, signal.SIGINT)
    if pools.role == "prefill":
        own = replace(engine, role="prefill")
        on_all_ranks(
            bundle, own, lambda: serve_prefill(bundle, own, pools, server), ignored=signals
        )
    elif routing.has_router:
        _serve_replicas(bundle, options)
    else:
        on_all_ranks(bundle, engine, lambda: _serve(bundle, options), ignored=signals)


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

    with listen(options.server.own_host, options.port) as listener:
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
    from tokenspeed_plan.runtime.serving.kv_events import kv_events, publisher

    own = options.routing
    with listen(options.server.own_host, options.port) as listener, publisher(own.kv_events) as out:
        check_reach(listener, options.server.api_key)
        template = load_chat_template(bundle, options.engine)
        with other_pools(bundle, options.engine, options.pools) as attach:
            engine = ready_engine(bundle, options.engine, template)
            attach(engine)
            ready = _ready_line(listener)
            with noted("serve", bundle, engine), kv_events(engine, out, own.kv_topic):
                serve(engine, options.server, listener, lambda: click.echo(ready, err=True))
            engine.loop.close()
