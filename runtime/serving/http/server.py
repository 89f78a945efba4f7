"""The server as a process: it listens, serves, and on SIGTERM finishes the requests in flight."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.engine import Engine
from tokenspeed_plan.runtime.grammars.grammar_compiler import GrammarCompiler, grammar_compiler
from tokenspeed_plan.runtime.request import Completion
from tokenspeed_plan.runtime.serving.async_engine import AsyncEngine
from tokenspeed_plan.runtime.serving.chat.known_turns import KnownTurns
from tokenspeed_plan.runtime.serving.http.app import Service, make_app
from tokenspeed_plan.runtime.serving.http.body import BodyMemory
from tokenspeed_plan.runtime.serving.http.connections import (
    Connection,
    Deadlines,
    Gate,
    connection_limit,
)
from tokenspeed_plan.runtime.serving.http.health import Progress
from tokenspeed_plan.runtime.serving.http.heap import HeapTrimmer
from tokenspeed_plan.runtime.serving.http.limiter import AdmissionLimiter
from tokenspeed_plan.runtime.serving.http.prometheus import Metrics
from tokenspeed_plan.runtime.serving.openai.conversion import RequestLimits
from tokenspeed_plan.runtime.tokenizer import Tokenizer

_FLUSH_S = 2  # time for finished answers to leave the sockets
_END_S = 4.0  # time for the threads to end after that
_WORKERS = 4  # threads


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Options of the server.

    Attributes:
        api_key: key that clients must send; None if they need none.
        model_name: the name that clients use; the plan's by default.
        max_requests: choices in flight; further requests get 429.
        body_timeout_s: time within which a body must arrive.
        drain_s: time that a signal leaves to requests in flight.
        max_connections: connections; fewer where the limit of open files leaves less.
        header_timeout_s: time within which a request's header must arrive.
        write_timeout_s: time within which a client must read a part of its answer.
        stall_s: `/health` fails once the engine has stood still for longer.
        own_host: the name that the server was told to listen on.
        drops_billing: leave a counter of Claude Code's out of its prompts.
    """

    api_key: str | None = None
    model_name: str | None = None
    max_requests: int = 256
    max_body_bytes: int = 8 << 20
    body_timeout_s: float = 30.0
    drain_s: float = 30.0
    max_connections: int = 1024
    header_timeout_s: float = 10.0
    write_timeout_s: float = 30.0
    stall_s: float = 30.0
    own_host: str = "localhost"
    drops_billing: bool = False


def listen(host: str, port: int) -> socket.socket:
    """Bind an address; nothing is accepted before the server runs.

    Raises:
        RequestError: the address is empty, in use or not allowed.
    """
    if not host.strip():
        raise RequestError(
            "`--host` is empty", "`127.0.0.1` is this machine alone, `0.0.0.0` every interface"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends each event at once (TCP_NODELAY) only if the socket names its protocol, TCP.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, UnicodeError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or "this is no name of a host"
        raise RequestError(
            f"cannot listen on {host:.80}:{port}: {reason}", "choose another `--port` or `--host`"
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
    with ThreadPoolExecutor(_WORKERS, "worker") as workers, ThreadPoolExecutor(1, "slow") as slow:
        service = _service(engine, options, workers, slow)
        config = http_config(make_app(service))
        # asyncio warns of every client that leaves in the middle of a stream.
        logging.getLogger("asyncio").setLevel(logging.ERROR)
        server = DrainingServer(config, _EngineWork(service), options, listener, ready)
        server.run([])
        for pool in (workers, slow):
            pool.shutdown(cancel_futures=True)
        server.last_resort.cancel()
    if service.engine.error:
        raise service.engine.error


def http_config(app: ASGIApp) -> uvicorn.Config:
    """How a `DrainingServer` serves an app."""
    return uvicorn.Config(
        app,
        http=Connection,
        log_level="error",  # it warns of each request that is no HTTP
        lifespan="on",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=_FLUSH_S,
    )


def _service(
    engine: Engine, options: ServerOptions, workers: Executor, slow_worker: Executor
) -> Service:
    if engine.tokenizer is None:
        raise RequestError(
            "the model has no tokenizer",
            "add its `tokenizer.json` to the model folder and plan again",
        )
    async_engine = AsyncEngine(engine)
    limiter = AdmissionLimiter(async_engine, options.max_requests)
    model = options.model_name or engine.plan.model.name
    metrics = Metrics(engine, limiter, model)
    turns = KnownTurns(engine.tokenizer, engine.plan.model.eos_token_ids)

    def note(completion: Completion) -> None:
        metrics.finish(completion)
        with suppress(RuntimeError):  # the threads have ended
            workers.submit(turns.note, completion)

    async_engine.on_completion = note
    async_engine.on_gap = metrics.note_gap
    return Service(
        engine=async_engine,
        tokenizer=engine.tokenizer,
        model=model,
        limits=RequestLimits(
            engine.max_seq_len,
            engine.default_max_tokens,
            engine.vocab_size,
            grammars=_grammars(engine, engine.tokenizer),
            takes_penalties=engine.plan.takes_penalties,
            turns=turns,
        ),
        created=int(time.time()),
        api_key=options.api_key,
        own_host=options.own_host,
        stall_s=options.stall_s,
        bodies=BodyMemory(options.max_body_bytes, options.body_timeout_s),
        workers=workers,
        slow_worker=slow_worker,
        limiter=limiter,
        metrics=metrics,
        progress=Progress(engine, async_engine),
        drops_billing=options.drops_billing,
    )


def _grammars(engine: Engine, tokenizer: Tokenizer) -> GrammarCompiler | None:
    """What compiles the forms of answers, ready for the first one."""
    found = grammar_compiler(engine.plan, tokenizer)
    if found is not None:
        found.warm_up()
    return found


class Work(Protocol):
    """What a server does for its clients, as far as signals end it."""

    @property
    def is_draining(self) -> bool:
        """Whether it takes no more requests."""

    @property
    def end_s(self) -> float:
        """How long it may take to end once everything is answered."""

    @property
    def num_in_flight(self) -> int:
        """What is not answered yet."""

    @property
    def has_failed(self) -> bool:
        """Whether it can answer nothing any more."""

    def note(self) -> None:
        """Called ten times a second."""

    def drain(self) -> None:
        """Take no more requests."""

    async def stop(self) -> None:
        """End what is not answered."""

    def watch_connections(
        self, num_open: Callable[[], int], num_refused: Callable[[], int]
    ) -> None:
        """Told once how to count connections."""


class _EngineWork:
    """The requests of an engine."""

    end_s = _END_S

    def __init__(self, service: Service) -> None:
        self._service = service
        self._limiter = service.limiter
        self.note = service.progress.note
        self.drain = service.limiter.drain.set
        self.watch_connections = service.metrics.watch_connections

    @property
    def is_draining(self) -> bool:
        return self._limiter.draining

    @property
    def num_in_flight(self) -> int:
        return self._limiter.num_in_flight

    @property
    def has_failed(self) -> bool:
        return self._service.engine.error is not None

    async def stop(self) -> None:
        self._limiter.stop.set()
        await self._service.engine.close()


class DrainingServer(uvicorn.Server):
    """A server that drains: after the first signal it finishes what is in flight and refuses more.

    uvicorn itself closes its listener at the first signal. A second signal ends it at once. It also
    accepts without bounds, so the listener is the gate's.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        work: Work,
        options: ServerOptions,
        listener: socket.socket,
        ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self.last_resort = LastResort()
        self._work = work
        self._options = options
        self._deadlines = Deadlines(options.header_timeout_s, options.write_timeout_s)
        self._max_connections = connection_limit(options.max_connections)
        self._listener = listener
        self._ready = ready
        self._heap = HeapTrimmer()
        self._num_signals = 0
        self._drain_until_s = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Count a signal. uvicorn would raise it again at the end."""
        self._num_signals += 1
        drain_s = self._options.drain_s
        if self._num_signals > 1:
            drain_s = 0.0
        self.last_resort.within(drain_s + 2 * _FLUSH_S + self._work.end_s)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; returns whether to stop."""
        work = self._work
        work.note()
        self._heap.note()
        self._gate.drop_late(self._deadlines)
        if self._num_signals and not work.is_draining:
            work.drain()
            self._drain_until_s = time.monotonic() + self._options.drain_s
        stop_now = self._num_signals > 1 or time.monotonic() > self._drain_until_s
        if stop_now:
            await self._stop()
        is_drained = work.is_draining and work.num_in_flight == 0
        return await super().on_tick(counter) or stop_now or is_drained or work.has_failed

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then call `ready`."""
        await super().startup(sockets)
        self._gate = Gate(
            self._listener, self._connection, self.server_state.connections, self._max_connections
        )
        self._gate.begin()
        self._work.watch_connections(
            lambda: len(self.server_state.connections), lambda: self._gate.num_refused
        )
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, and end the connections."""
        self.last_resort.within(2 * _FLUSH_S + self._work.end_s)
        self._gate.end()
        await super().shutdown(sockets)

    async def _stop(self) -> None:
        """End the requests in flight; a thread that stands still is not waited for here."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_S):
                await self._work.stop()

    def _connection(self) -> Connection:
        return Connection(self.config, self.server_state, self.lifespan.state)


class LastResort:
    """Ends the process if it does not end by itself, whatever its other threads do.

    The thread runs before it is needed, since a signal's handler must not start one.
    """

    def __init__(self) -> None:
        self._deadline_s = float("inf")
        self._seconds = 0.0
        self._cancelled = threading.Event()
        threading.Thread(target=self._wait, name="last resort", daemon=True).start()

    def within(self, seconds: float) -> None:
        """End the process after this time, or sooner if that was said before."""
        deadline_s = time.monotonic() + seconds
        if deadline_s < self._deadline_s:
            self._deadline_s, self._seconds = deadline_s, seconds

    def cancel(self) -> None:
        """Let the process go on."""
        self._cancelled.set()

    def _wait(self) -> None:
        while not self._cancelled.wait(0.2):
            if time.monotonic() > self._deadline_s:
                _end_process(self._seconds)


def _end_process(seconds: float) -> None:
    text = (
        f"error: the server did not end within {seconds:g} s, a thread of it stands still\n\n"
        "hint: start it again; the requests that it had are lost\n"
    )
    os.write(2, text.encode())
    os._exit(1)
