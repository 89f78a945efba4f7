"""Pools of a plan as processes: options, the prefill pool, and the one that answers.

`tokenspeed serve` and `tokenspeed run` start the prefill pool of a bundle on this host themselves,
unless it runs elsewhere already. It ends with them, and is started again where it dies.
"""

from __future__ import annotations

import functools
import itertools
import os
import secrets
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from tokenspeed_plan.planner.commands.engines import (
    EngineOptions,
    load_engine,
    written_pools,
)
from tokenspeed_plan.planner.commands.option_types import seconds_option
from tokenspeed_plan.planner.commands.rank_processes import (
    environment_alone,
    own_command,
    parent_variables,
)
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.errors import PoolError, RequestError
from tokenspeed_plan.plans.schema import Plan

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.engine import Engine
    from tokenspeed_plan.runtime.pools.prefill_server import PrefillServer
    from tokenspeed_plan.runtime.serving.http import ServerOptions

Role = Literal["prefill", "decode"]
Address = tuple[str, int]
_LOOPBACK = "127.0.0.1"
_TOKEN = "TOKENSPEED_PEER_TOKEN"  # the name of a variable
_LISTENER = "TOKENSPEED_LISTENER"  # the number of a socket that listens already
_WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)  # before a pool is started again
_END_S = 5.0


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """Which pool of a bundle this process is, and how it reaches others.

    Attributes:
        role: None for both pools on this host.
        listen: where the prefill pool listens.
        peers: prefill pools of a decode pool.
        token: that all pools know; empty where they listen on this machine alone.
        timeout_s: after which a peer that says nothing gets no more prompts.
        transport: by which caches are handed over.
        metrics_port: where the prefill pool shows its metrics, on the host where it listens; None
            for nowhere.
    """

    role: Role | None = None
    listen: Address = (_LOOPBACK, 0)
    peers: tuple[Address, ...] = ()
    token: str = ""
    timeout_s: float = 10.0
    transport: str = "shm"
    metrics_port: int | None = None


_OPTIONS = (
    click.option(
        "--pool",
        type=click.Choice(["prefill", "decode"]),
        help="Only this pool of the bundle; both start on this host by default.",
    ),
    click.option("--listen", metavar="HOST:PORT", help="Of `--pool prefill`: where it listens."),
    click.option("--peers", metavar="HOST:PORT,...", help="Of `--pool decode`: the prefill pools."),
    click.option(
        "--metrics-port",
        type=click.IntRange(0, 65535),
        help="Of the prefill pool: where it has /metrics, /health and /ready.",
    ),
    click.option(
        "--peer-token",
        default="",
        envvar=_TOKEN,
        show_envvar=True,
        help="What pools must know of each other to connect.",
    ),
    seconds_option(
        "--peer-timeout",
        "peer_timeout_s",
        10.0,
        "Seconds after which a prefill pool that says nothing gets no more prompts.",
    ),
    click.option(
        "--transport",
        type=click.Choice(["shm", "nixl"]),
        default="shm",
        show_default=True,
        help="How caches are handed over: on one host, or by NIXL.",
    ),
)


def pool_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of pools; the command gets them as one, `pools`."""

    @functools.wraps(command)
    def with_pools(
        *args: Any,
        pool: Role | None,
        listen: str | None,
        peers: str | None,
        peer_token: str,
        peer_timeout_s: float,
        transport: str,
        metrics_port: int | None,
        **others: Any,
    ) -> None:
        stated = replace(_stated(pool, listen, peers), metrics_port=metrics_port)
        if metrics_port is not None and pool == "decode":
            raise RequestError(
                "`--metrics-port` is of the prefill pool", "this one shows `/metrics` beside `/v1`"
            )
        pools = replace(stated, token=peer_token, timeout_s=peer_timeout_s, transport=transport)
        command(*args, pools=pools, **others)

    for option in reversed(_OPTIONS):
        with_pools = option(with_pools)
    return with_pools


def _stated(pool: Role | None, listen: str | None, peers: str | None) -> PoolOptions:
    """The pool that the options name.

    Raises:
        RequestError: they contradict each other.
    """
    if (pool == "prefill") != (listen is not None):
        raise RequestError(
            "`--pool prefill` and `--listen HOST:PORT` belong together",
            "`--pool prefill --listen 127.0.0.1:7000`, and `--pool decode --peers 127.0.0.1:7000`",
        )
    if (pool == "decode") != (peers is not None):
        raise RequestError(
            "`--pool decode` and `--peers HOST:PORT,...` belong together",
            "without `--pool`, both pools start on this host",
        )
    places = tuple(map(_address, (peers or "").split(","))) if peers is not None else ()
    return PoolOptions(pool, _address(listen) if listen else (_LOOPBACK, 0), places)


def _address(text: str) -> Address:
    host, _, port = text.strip().rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise RequestError(f"`{text:.80}` is no HOST:PORT", "as in `127.0.0.1:7000`")
    return host.strip("[]"), int(port)


def serve_prefill(
    bundle: Path, options: EngineOptions, pools: PoolOptions, server_options: ServerOptions
) -> None:
    """As rank 0, be the prefill pool of a bundle until a signal comes.

    Raises:
        TokenspeedError: the bundle has none, or it cannot be loaded or reached.
    """
    with _listener(pools) as listener, _metrics_listener(pools) as metrics_listener:
        plan = load_plan(bundle, options.signers)
        engine = load_engine(bundle, options)
        from tokenspeed_plan.runtime.pools.pool_rank import make_transport
        from tokenspeed_plan.runtime.pools.prefill_server import make_prefill_server

        transport = make_transport(pools.transport, engine.executor.memory)
        server = make_prefill_server(engine, plan, transport, pools.token)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.stop())
        host, port = listener.getsockname()[:2]
        if _LISTENER not in os.environ:
            click.echo(f"prefill pool ready at {host}:{port}", err=True)
        with _status_of(server, engine, server_options, metrics_listener):
            server.serve(listener)


def _metrics_listener(pools: PoolOptions) -> AbstractContextManager[socket.socket | None]:
    """The socket of the pool's pages, on the host where it listens."""
    if pools.metrics_port is None:
        return nullcontext()
    from tokenspeed_plan.runtime.serving.http import listen

    return listen(pools.listen[0], pools.metrics_port)


def _status_of(
    server: PrefillServer,
    engine: Engine,
    options: ServerOptions,
    listener: socket.socket | None,
) -> AbstractContextManager[None]:
    """Show how a prefill pool is, where there is a socket for it."""
    if listener is None:
        return nullcontext()
    from tokenspeed_plan.runtime.serving.http.pool_status import PoolStatus, showing

    host, port = listener.getsockname()[:2]
    click.echo(f"metrics of the prefill pool at http://{host}:{port}/metrics", err=True)
    model = options.model_name or engine.plan.model.name
    return showing(PoolStatus(engine, server, model, options.stall_s), options, listener)


def _listener(pools: PoolOptions) -> socket.socket:
    """The socket that callers connect to: the one that was given, or a new one.

    Raises:
        RequestError: it cannot be, or others could come without a token.
    """
    if _LISTENER in os.environ:
        return socket.socket(fileno=int(os.environ[_LISTENER]))
    from tokenspeed_plan.runtime.serving.http.callers import is_loopback

    host, port = pools.listen
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise RequestError(
            f"cannot listen on {host:.80}:{port}: {error.strerror or error}",
            "choose another `--listen`",
        ) from error
    if not pools.token and not is_loopback(listener.getsockname()[0]):
        listener.close()
        raise RequestError(
            f"without a token a pool may listen on this machine alone, not on {host:.80}",
            f"give all pools the same `--peer-token` (or {_TOKEN}), or listen on 127.0.0.1",
        )
    return listener


@contextmanager
def other_pools(
    bundle: Path, options: EngineOptions, pools: PoolOptions
) -> Iterator[Callable[[Engine], None]]:
    """The other pools of a bundle: those that run elsewhere, or one that is started here.

    Yields:
        A function that lets an engine use them.

    Raises:
        PoolError: the bundle has none where one is named.
    """
    if pools.role is None and pools.metrics_port is None and written_pools(bundle) == 1:
        yield lambda engine: None
        return
    plan = load_plan(bundle, options.signers)
    if not plan.has_two_pools:
        option = f"`--pool {pools.role}`" if pools.role else "`--metrics-port`"
        raise PoolError(
            f"the plan has one pool, not one for {option}",
            "plan with `disaggregation: {prefill: 1, decode: 1}`",
        )
    if not options.cache:
        raise PoolError(
            "pools hand over prefixes, and `--no-cache` keeps none", "leave `--no-cache` out"
        )
    if pools.role == "decode":
        yield lambda engine: _attach(engine, plan, pools)
        return
    token = secrets.token_hex(16)
    with socket.create_server((_LOOPBACK, 0)) as listener:
        child = _PrefillProcess(listener, token, _command(plan, bundle, options, pools))
        own = replace(pools, peers=(listener.getsockname()[:2],), token=token)
        try:
            yield lambda engine: _attach(engine, plan, own, child)
        finally:
            child.end()


def _attach(
    engine: Engine, plan: Plan, pools: PoolOptions, child: _PrefillProcess | None = None
) -> None:
    """Let an engine use prefill pools; one that was started here must be there.

    Raises:
        PoolError: none of them runs this plan.
    """
    from tokenspeed_plan.runtime.pools.handovers import PeerOptions, make_handovers
    from tokenspeed_plan.runtime.pools.pool_rank import make_transport

    transport = make_transport(pools.transport, engine.executor.memory)
    peers = PeerOptions(pools.peers, pools.token, pools.timeout_s)
    handovers = make_handovers(engine, plan, transport, peers)
    if not handovers.start() and child is not None:
        raise PoolError("the prefill pool did not start", "its own error stands above")
    if child is not None:
        child.watch()
    engine.loop.elsewhere = handovers


@dataclass(frozen=True, slots=True)
class _Command:
    """The words of the prefill pool's command, and its own variables."""

    words: tuple[str, ...]
    variables: dict[str, str]


def _command(plan: Plan, bundle: Path, options: EngineOptions, pools: PoolOptions) -> _Command:
    """How the prefill pool is started beside this process.

    Raises:
        PoolError: there is no GPU left for it.
    """
    words = ["serve", str(bundle), "--pool", "prefill", "--listen", f"{_LOOPBACK}:0"]
    words += ["--transport", pools.transport, "--rank-timeout", str(options.rank_timeout_s)]
    if pools.metrics_port is not None:
        words += ["--metrics-port", str(pools.metrics_port)]
    if options.weights is not None:
        words += ["--weights", str(options.weights)]
    if options.backend is not None:
        words += ["--backend", options.backend]
    if options.signers is not None:
        words += ["--require-signature", str(options.signers.allowed)]
        if options.signers.signer is not None:
            words += ["--signer", options.signers.signer]
    variables = {}
    if plan.target.device == "cuda":
        from tokenspeed_plan.runtime.pools.devices import prefill_devices

        variables["CUDA_VISIBLE_DEVICES"] = prefill_devices(plan)
    return _Command(tuple(words), variables)


class _PrefillProcess:
    """The prefill pool that this process has started.

    Args:
        listener: where it listens; it stays open here, so that another one can take its place.
        token: that callers must know.
        command: what starts it.
    """

    def __init__(self, listener: socket.socket, token: str, command: _Command) -> None:
        self._listener = listener
        self._token = token
        self._command = command
        self._ended = threading.Event()
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        number = self._listener.fileno()
        own = {_LISTENER: str(number), _TOKEN: self._token}
        with parent_variables() as (variables, stderr):
            return subprocess.Popen(
                own_command(self._command.words),
                env=environment_alone() | self._command.variables | own | variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=[number, stderr],
                process_group=0,
            )

    def watch(self) -> None:
        """Start it again where it ends by itself, from now on."""
        threading.Thread(target=self._watch, name="prefill pool", daemon=True).start()

    def _watch(self) -> None:
        for wait_s in itertools.chain(_WAITS_S, itertools.repeat(_WAITS_S[-1])):
            code = self._process.wait()
            if self._ended.wait(wait_s):
                return
            click.echo(
                f"the prefill pool has ended with code {code}; it is started again", err=True
            )
            self._process = self._start()

    def end(self) -> None:
        """End it, if it has not."""
        self._ended.set()
        self._process.terminate()  # so that it ends its own ranks
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
