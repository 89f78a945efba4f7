"""The server as a process: it listens, serves, and on SIGTERM finishes the requests in flight."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import uvicorn

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.engine import Engine
from tokenspeed_plan.runtime.serving.async_engine import AsyncEngine
from tokenspeed_plan.runtime.serving.http.app import Service, make_app
from tokenspeed_plan.runtime.serving.http.limiter import AdmissionLimiter
from tokenspeed_plan.runtime.serving.http.prometheus import Metrics
from tokenspeed_plan.runtime.serving.openai.conversion import RequestLimits

_FLUSH_S = 2  # time for finished answers to leave the sockets


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Options of the server.

    Attributes:
        api_key: key that clients must send; None if they need none.
        model_name: the name that clients use; the plan's by default.
        max_requests: choices in flight; further requests get 429.
        body_timeout_s: time within which a body must arrive.
        drain_s: time that a signal leaves to requests in flight.
    """

    api_key: str | None = None
    model_name: str | None = None
    max_requests: int = 256
    max_body_bytes: int = 8 << 20
    body_timeout_s: float = 30.0
    drain_s: float = 30.0


def listen(host: str, port: int) -> socket.socket:
    """Bind an address; nothing is accepted before the server runs.

    Raises:
        RequestError: the address is in use or not allowed.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends each event at once (TCP_NODELAY) only if the socket names its protocol, TCP.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise RequestError(
            f"cannot listen on {host}:{port}: {error.strerror}", "choose another `--port`"
        ) from error
    return listener


def serve(
    engine: Engine, options: ServerOptions, listener: socket.socket, ready: Callable[[], None]
) -> None:
    """Serve until a signal comes and all requests in flight are answered, or `drain_s` is over.

    `ready` is called once the server listens.

    Raises:
        RequestError: the model has no tokenizer.
        TokenspeedError: the engine has failed.
    """
    service = _service(engine, options)
    config = uvicorn.Config(
        make_app(service),
        log_level="warning",
        lifespan="on",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=_FLUSH_S,
    )
    # asyncio warns of every client that leaves in the middle of a stream.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    _Server(config, service, options.drain_s, ready).run([listener])
    if service.engine.error:
        raise service.engine.error


def _service(engine: Engine, options: ServerOptions) -> Service:
    if engine.tokenizer is None:
        raise RequestError(
            "the model has no tokenizer",
            "add its `tokenizer.json` to the model folder and plan again",
        )
    async_engine = AsyncEngine(engine)
    limiter = AdmissionLimiter(async_engine, options.max_requests)
    metrics = Metrics(engine, limiter)
    async_engine.on_completion = metrics.finish
    return Service(
        engine=async_engine,
        tokenizer=engine.tokenizer,
        model=options.model_name or engine.plan.model.name,
        limits=RequestLimits(engine.max_seq_len, engine.default_max_tokens, engine.vocab_size),
        created=int(time.time()),
        api_key=options.api_key,
        max_body_bytes=options.max_body_bytes,
        body_timeout_s=options.body_timeout_s,
        limiter=limiter,
        metrics=metrics,
    )


class _Server(uvicorn.Server):
    """A server that drains: after the first signal it finishes what is in flight and refuses more.

    uvicorn itself closes its listener at the first signal. A second signal ends it at once.
    """

    def __init__(
        self, config: uvicorn.Config, service: Service, drain_s: float, ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._service = service
        self._drain_s = drain_s
        self._ready = ready
        self._num_signals = 0
        self._drain_until_s = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Count a signal. uvicorn would raise it again at the end."""
        self._num_signals += 1

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; returns whether to stop."""
        limiter = self._service.limiter
        if self._num_signals and not limiter.draining:
            limiter.draining = True
            self._drain_until_s = time.monotonic() + self._drain_s
        stop_now = self._num_signals > 1 or time.monotonic() > self._drain_until_s
        if stop_now:
            await self._service.engine.close()
        is_drained = limiter.draining and limiter.num_in_flight == 0
        has_failed = self._service.engine.error is not None
        return await super().on_tick(counter) or stop_now or is_drained or has_failed

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then call `ready`."""
        await super().startup(sockets)
        self._ready()
