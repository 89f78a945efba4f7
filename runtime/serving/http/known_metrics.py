"""The metrics under the names that dashboards of vLLM know, with the model as a label."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tokenspeed_plan.runtime.engine import Engine
from tokenspeed_plan.runtime.request import Completion

_LABEL = "model_name"
_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
_TOKENS = tuple(float(1 << power) for power in range(0, 21, 2))
_HISTOGRAMS = {
    "time_to_first_token_seconds": _SECONDS,
    "e2e_request_latency_seconds": _SECONDS,
    "request_queue_time_seconds": _SECONDS,
    "request_prompt_tokens": _TOKENS,
    "request_generation_tokens": _TOKENS,
}


def add_counted(registry: CollectorRegistry, engine: Engine, model: str) -> None:
    """Add what an engine of a model counts by itself."""
    for name, value in {
        "num_requests_running": lambda: engine.usage.running,
        "num_requests_waiting": lambda: engine.usage.waiting,
        "kv_cache_usage_perc": lambda: (
            engine.usage.pages / max(engine.plan.pool.limits.num_pages, 1)
        ),
    }.items():
        gauge = Gauge(f"vllm:{name}", "As vLLM's", [_LABEL], registry=registry)
        gauge.labels(model).set_function(value)
    registry.register(_Counted(engine, model))


class KnownMetrics:
    """Counters, gauges and latencies of one model.

    Args:
        registry: where they are added.
        engine: what they are read from.
        model: the name that clients use.
    """

    def __init__(self, registry: CollectorRegistry, engine: Engine, model: str) -> None:
        self._model = model
        self._histograms = {
            name: Histogram(
                f"vllm:{name}", "As vLLM's", [_LABEL], registry=registry, buckets=buckets
            ).labels(model)
            for name, buckets in _HISTOGRAMS.items()
        }
        self._success = Counter(
            "vllm:request_success", "As vLLM's", [_LABEL, "finished_reason"], registry=registry
        )
        add_counted(registry, engine, model)
        self._gaps = _Gaps(model)
        registry.register(self._gaps)

    def finish(self, done: Completion) -> None:
        """Count an answer that is finished, and has no error."""
        num_tokens = len(done.token_ids)
        self._success.labels(self._model, done.finish_reason).inc()
        values = {
            "time_to_first_token_seconds": done.ttft_s,
            "e2e_request_latency_seconds": done.ttft_s + done.decode_s,
            "request_queue_time_seconds": done.queue_s,
            "request_prompt_tokens": done.num_prompt_tokens,
            "request_generation_tokens": num_tokens,
        }
        for name, value in values.items():
            self._histograms[name].observe(value)

    def note_gap(self, gap_s: float, number: int) -> None:
        """Note the time before a token; those that came together share it."""
        self._gaps.note(gap_s, number)


class _Gaps(Collector):
    """The time before each token, counted without the locks that a `Histogram` takes for each."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._counts = [0] * (len(_SECONDS) + 1)  # up to each bound, and over all
        self._sum_s = 0.0

    def note(self, gap_s: float, number: int) -> None:
        """Count a gap so many times."""
        self._counts[bisect_left(_SECONDS, gap_s)] += number
        self._sum_s += gap_s * number

    def collect(self) -> Iterator[Metric]:
        """The histogram as it is now."""
        family = HistogramMetricFamily(
            "vllm:inter_token_latency_seconds", "As vLLM's", labels=[_LABEL]
        )
        bounds = [*(str(float(bound)) for bound in _SECONDS), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        family.add_metric([self._model], buckets, self._sum_s)
        yield family


class _Counted(Collector):
    """What the engine counts by itself, read when it is asked for."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine = engine
        self._model = model

    def collect(self) -> Iterator[Metric]:
        """Counters with their values now."""
        counts = self._engine.metrics
        more = counts.decode_tokens - counts.decode_passes  # tokens that came from drafts
        values = {
            "prompt_tokens": counts.hit_tokens + counts.computed_tokens,
            "prefix_cache_queries": counts.hit_tokens + counts.computed_tokens,
            "prefix_cache_hits": counts.hit_tokens,
            "num_preemptions": counts.preemptions,
            "generation_tokens": counts.decode_tokens,
            "spec_decode_num_drafts": counts.decode_passes * bool(self._depth),
            "spec_decode_num_accepted_tokens": max(more, 0),
        }
        for name, value in values.items():
            family = CounterMetricFamily(f"vllm:{name}", "As vLLM's", labels=[_LABEL])
            family.add_metric([self._model], value)
            yield family

    @property
    def _depth(self) -> int:
        return self._engine.plan.pool.limits.max_depth
