"""What a prefill pool says over HTTP: what it has done, and how it is. It takes no orders there."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, Gauge

from tokenspeed_plan.runtime.engine import Engine
from tokenspeed_plan.runtime.execution.rank_links import rank_fault
from tokenspeed_plan.runtime.pools.prefill_jobs import PrefillJob
from tokenspeed_plan.runtime.pools.prefill_server import PrefillServer
from tokenspeed_plan.runtime.serving.http.api_errors import ApiError, shutting_down, try_later
from tokenspeed_plan.runtime.serving.http.callers import CheckHost, is_loopback
from tokenspeed_plan.runtime.serving.http.known_metrics import add_counted
from tokenspeed_plan.runtime.serving.http.prometheus import (
    CountResponses,
    MetricsPage,
    engine_gauges,
)
from tokenspeed_plan.runtime.serving.http.server import DrainingServer, ServerOptions, http_config

_READ = ["GET", "HEAD"]
_START_S = 5.0


class PoolMetrics(MetricsPage):
    """Counters of a prefill pool. What has the name of a decode pool's metric means the same."""

    def __init__(self, engine: Engine, pool: PrefillServer, model: str) -> None:
        super().__init__()
        add_counted(self.registry, engine, model)
        self.add_gauges(
            *engine_gauges(engine),
            ("decode_pools", "Decode pools that are connected", lambda: pool.num_callers),
            ("handovers_in_flight", "Prompts that they wait for", lambda: pool.num_orders),
        )
        self._prompt = self._counter("prompt_tokens", "Prompt tokens that were handed over")
        self._cached = self._counter(
            "cached_prompt_tokens", "Of these, those that were found in the prefix cache"
        )
        self._done, self._failed, self._size_bytes, self._exposed_s = (
            Gauge(f"tokenspeed_{name}", text, registry=self.registry)
            for name, text in (
                ("handovers_done", "Prompts that were handed over"),
                ("handovers_failed", "Prompts that were given up"),
                ("handover_bytes", "Bytes that went to decode pools"),
                ("handover_exposed_seconds", "After the last token of a prompt was computed"),
            )
        )

    def count(self, job: PrefillJob) -> None:
        """Count an order that is over."""
        if job.has_failed:
            self._failed.inc()
        elif job.is_computed:
            self._done.inc()
            self._prompt.inc(len(job.order.token_ids))
            self._cached.inc(job.num_cached)
            self._size_bytes.inc(job.size_bytes)
            self._exposed_s.inc(time.perf_counter() - job.computed_s)


class PoolStatus:
    """The pages of a prefill pool; as the work of a server, it has nothing in flight.

    Args:
        engine: of the pool.
        pool: takes the orders.
        model: the name that dashboards know.
        stall_s: a pool that stands still for longer is not healthy.
    """

    num_in_flight = 0
    has_failed = False
    end_s = 0.0

    def __init__(self, engine: Engine, pool: PrefillServer, model: str, stall_s: float) -> None:
        self.metrics = PoolMetrics(engine, pool, model)
        self.watch_connections = self.metrics.watch_connections
        self.is_draining = False
        self._pool = pool
        self._stall_s = stall_s
        pool.on_over = self.metrics.count

    def note(self) -> None:
        """Called ten times a second."""

    def drain(self) -> None:
        """End with the next look at it."""
        self.is_draining = True

    async def stop(self) -> None:
        """There is nothing to end."""

    def app(self, own_host: str | None) -> FastAPI:
        """Its pages; with a name, for those alone who call it by that or by loopback's."""
        app = FastAPI(openapi_url=None)
        app.add_api_route("/metrics", self._show_metrics, methods=_READ)
        app.add_api_route("/health", self._show_health, methods=_READ)
        app.add_api_route("/ready", self._show_whether_ready, methods=_READ)
        if own_host is not None:
            app.add_middleware(CheckHost, own_host=own_host)
        app.add_middleware(CountResponses, metrics=self.metrics)
        return app

    async def _show_metrics(self, request: Request) -> Response:
        return PlainTextResponse(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def _show_health(self, request: Request) -> Response:
        return _said(self._fault())

    async def _show_whether_ready(self, request: Request) -> Response:
        fault = self._fault()
        if fault is None and self._pool.is_full:
            fault = try_later(429, "the pool has no place for another prompt", "too_many_requests")
        return _said(fault)

    def _fault(self) -> ApiError | None:
        """Why no prompt would be computed."""
        if self.is_draining:
            return shutting_down()
        reason = rank_fault()
        if self._pool.stands_s > self._stall_s:
            reason = f"the pool has not moved for {self._pool.stands_s:.0f} s"
        if reason is None:
            return None
        return try_later(503, reason, "stalled")


def _said(fault: ApiError | None) -> Response:
    if fault is None:
        return JSONResponse({"status": "ok"})
    return fault.response()


@contextmanager
def showing(status: PoolStatus, options: ServerOptions, listener: socket.socket) -> Iterator[None]:
    """Show the pages of a prefill pool, on a thread of their own."""
    own_host = options.own_host if is_loopback(listener.getsockname()[0]) else None
    config, ready = http_config(status.app(own_host)), threading.Event()
    server = DrainingServer(config, status, options, listener, ready.set)
    thread = threading.Thread(target=server.run, args=([],), name="status", daemon=True)
    thread.start()
    ready.wait(_START_S)
    try:
        yield
    finally:
        status.drain()
        thread.join()
        server.last_resort.cancel()
