"""Metrics for Prometheus, in a registry of this server alone."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenspeed_plan.runtime.engine import Engine
from tokenspeed_plan.runtime.pools.handover_counts import GaugeRow, Gauges
from tokenspeed_plan.runtime.request import Completion
from tokenspeed_plan.runtime.serving.http.known_metrics import KnownMetrics
from tokenspeed_plan.runtime.serving.http.limiter import AdmissionLimiter

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class MetricsPage:
    """Metrics of one process; what it knows of its connections is added once it listens."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._responses = self._counter(
            "http_responses", "Responses by endpoint and status", "path", "status"
        )

    def respond(self, path: str, status: int) -> None:
        """Count a response."""
        self._responses.labels(path, str(status)).inc()

    def watch_connections(
        self, num_open: Callable[[], int], num_refused: Callable[[], int]
    ) -> None:
        """Add what the server knows once it listens."""
        refused = "Connections that found no room, since the start"
        self.add_gauges(
            ("connections", "Open connections", num_open),
            ("connections_refused", refused, num_refused),
        )

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)

    def add_gauges(self, *gauges: GaugeRow) -> None:
        """Add numbers that are read when they are asked for."""
        for name, text, value in gauges:
            Gauge(f"tokenspeed_{name}", text, registry=self.registry).set_function(value)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"tokenspeed_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"tokenspeed_{name}", text, buckets=_SECONDS, registry=self.registry)


class Metrics(MetricsPage):
    """Counters and latencies of the server, and gauges of what is in use."""

    def __init__(self, engine: Engine, limiter: AdmissionLimiter, model: str) -> None:
        super().__init__()
        self._known = KnownMetrics(self.registry, engine, model)
        in_flight = "Choices, until their response is sent"
        self.add_gauges(
            *engine_gauges(engine),
            ("requests_in_flight", in_flight, lambda: limiter.num_in_flight),
            *(engine.loop.elsewhere.gauges() if engine.loop.elsewhere else ()),
        )
        self._finished = self._counter("requests_finished", "Choices answered, by reason", "reason")
        self._cancelled = self._counter(
            "requests_cancelled", "Choices whose client left before the end"
        )
        self._prompt = self._counter("prompt_tokens", "Prompt tokens of answered choices")
        self._cached = self._counter(
            "cached_prompt_tokens",
            "Prompt tokens of answered choices that were found in the prefix cache",
        )
        self._generated = self._counter("generated_tokens", "Tokens of answers")
        self._queue = self._histogram(
            "queue_time_seconds", "From the engine's queue to its first step"
        )
        self._e2e = self._histogram(
            "request_latency_seconds", "From the engine's queue to the last token"
        )
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "From the engine's queue to the first token"
        )
        self._tpot = self._histogram(
            "time_per_output_token_seconds", "Mean time between two tokens of an answer"
        )

    def finish(self, done: Completion) -> None:
        """Count an answer that is finished."""
        tokens = len(done.token_ids)
        self._finished.labels(done.finish_reason).inc()
        if done.error is not None:
            return
        self._known.finish(done)
        self._queue.observe(done.queue_s)
        self._e2e.observe(done.ttft_s + done.decode_s)
        self._prompt.inc(done.num_prompt_tokens)
        self._cached.inc(done.num_cached_tokens)
        self._generated.inc(tokens)
        self._ttft.observe(done.ttft_s)
        if tokens > 1:
            self._tpot.observe(done.decode_s / (tokens - 1))

    def note_gap(self, gap_s: float, number: int) -> None:
        """Note the time before each of so many tokens."""
        self._known.note_gap(gap_s, number)

    def cancel(self, count: int) -> None:
        """Count choices whose client left before the end."""
        self._cancelled.inc(count)


def engine_gauges(engine: Engine) -> Gauges:
    """What an engine has and uses."""
    limits = engine.plan.pool.limits
    return [
        ("requests_waiting", "Choices that wait for a slot", lambda: engine.usage.waiting),
        ("requests_running", "Choices that have a slot", lambda: engine.usage.running),
        (
            "state_slots_used",
            "Slots of recurrent state that requests hold",
            lambda: engine.usage.state_slots,
        ),
        (
            "state_slots",
            "Slots of recurrent state, the prefix cache's included",
            lambda: limits.num_state_slots - 2,
        ),
        (
            "kv_pages_used",
            "Pages of the KV cache that requests hold",
            lambda: engine.usage.pages,
        ),
        (
            "tokens_per_decode_pass",
            "Tokens that a choice gains in a decode step",
            lambda: engine.metrics.tokens_per_pass,
        ),
        (
            "kv_pages",
            "Pages of the KV cache, the prefix cache's included",
            lambda: limits.num_pages,
        ),
        (
            "host_cache_hits",
            "Choices that began at a checkpoint from the host's memory",
            lambda: engine.metrics.host_hits,
        ),
        (
            "host_cache_stored_bytes",
            "Bytes that a rank copied to the host's memory",
            lambda: engine.metrics.host_stored_bytes,
        ),
        (
            "host_cache_loaded_bytes",
            "Bytes that a rank copied back",
            lambda: engine.metrics.host_loaded_bytes,
        ),
        (
            "host_cache_evicted_checkpoints",
            "Checkpoints that the host's memory had no room for any more",
            lambda: engine.metrics.host_evicted_checkpoints,
        ),
    ]


class CountResponses:
    """Counts responses by route; unknown paths are `other`, so that clients add no labels."""

    def __init__(self, app: ASGIApp, metrics: MetricsPage) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request and count its response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.respond(
                    getattr(scope.get("route"), "path", "other"), message["status"]
                )
            await send(message)

        await self._app(scope, receive, counted)
