"""The server as a process: it listens, serves, and on SIGTERM finishes what it has begun."""

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
from tokenspeed_plan.runtime.serving.http.admission import AdmissionLimiter
from tokenspeed_plan.runtime.serving.http.app import Service, make_app
from tokenspeed_plan.runtime.serving.http.prometheus import Metrics
from tokenspeed_plan.runtime.serving.openai.requests import RowLimits

_FLUSH_S = 2  # for what is answered to leave the sockets


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What the command line says."""

    api_key: str | None = None
    model_name: str | None = None
    max_requests: int = 256
    max_body_bytes: int = 8 << 20
    body_timeout_s: float = 30.0
    drain_s: float = 30.0


def listen(host: str, port: int) -> socket.socket:
    """An address of our own; nothing is accepted before the server runs.

    Raises:
        RequestError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Only of a socket that says it is TCP does asyncio send each event at once (TCP_NODELAY).
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise RequestError(
            f"cannot listen on {host}:{port}: {error.strerror}", "choose another `--port`"
        ) from error
    return found


def serve(
    engine: Engine, options: ServerOptions, place: socket.socket, ready: Callable[[], None]
) -> None:
    """Serve until a signal says stop and everything begun is answered, or `drain_s` is over.

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
    logging.getLogger("asyncio").setLevel(
        logging.ERROR
    )  # clients that leave in mid-stream are no news
    _Server(config, service, options.drain_s, ready).run([place])
    if service.engine.error:
        raise service.engine.error


def _service(engine: Engine, options: ServerOptions) -> Service:
    if engine.tokenizer is None:
        raise RequestError(
            "the model has no tokenizer",
            "add its `tokenizer.json` to the model folder and plan again",
        )
    served = AsyncEngine(engine)
    gate = AdmissionLimiter(served, options.max_requests)
    metrics = Metrics(engine, gate)
    served.on_completion = metrics.finish
    return Service(
        engine=served,
        tokenizer=engine.tokenizer,
        model=options.model_name or engine.plan.model.name,
        limits=RowLimits(engine.max_seq_len, engine.default_max_tokens, engine.vocab_size),
        created=int(time.time()),
        api_key=options.api_key,
        max_body_bytes=options.max_body_bytes,
        body_timeout_s=options.body_timeout_s,
        gate=gate,
        metrics=metrics,
    )


class _Server(uvicorn.Server):
    """uvicorn closes its listener at the first signal; this one first answers what is in flight, and says 503 to more.

    The second signal ends it at once.
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
        """A signal; uvicorn would send it to itself once more when all is done."""
        self._num_signals += 1

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: is it time to leave?"""
        now, service = time.monotonic(), self._service
        if self._num_signals and not service.gate.draining:
            service.gate.draining = True
            self._drain_until_s = now + self._drain_s
        over = self._num_signals > 1 or now > self._drain_until_s
        if over:
            await service.engine.close()
        done = service.gate.draining and not service.gate.num_held
        return await super().on_tick(counter) or over or done or service.engine.error is not None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say so once it listens."""
        await super().startup(sockets)
        self._ready()
