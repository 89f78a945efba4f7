"""The metrics of all replicas in one page, each with a label `replica`, and those of the router."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import httpx
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tokenspeed_plan.runtime.serving.router.fleet import Fleet, Replica

_ANSWER_S = 5.0


class FleetMetrics:
    """Counts what the router does, and gathers what the replicas count."""

    def __init__(self, fleet: Fleet, client: httpx.AsyncClient) -> None:
        self.routed: Counter[tuple[int, str]] = Counter()  # by replica and reason
        self.lost: Counter[int] = Counter()  # streams that broke off, by replica
        self.num_open: Callable[[], int] = lambda: 0
        self.num_refused: Callable[[], int] = lambda: 0
        self._fleet = fleet
        self._client = client

    async def text(self) -> bytes:
        """All of them in Prometheus's text format."""
        pages = await asyncio.gather(*map(self._page, self._fleet.replicas))
        merged = _merged(zip(self._fleet.replicas, pages, strict=True))
        registry = CollectorRegistry()
        registry.register(_Collected([*merged, *self._own()]))
        return generate_latest(registry)

    async def _page(self, replica: Replica) -> str:
        if replica.url is None:
            return ""
        try:
            response = await self._client.get(f"{replica.url}/metrics", timeout=_ANSWER_S)
        except httpx.TransportError:
            return ""
        return response.text

    def _own(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("tokenspeed_replica_up", "Takes requests", labels=["replica"])
        restarts = CounterMetricFamily(
            "tokenspeed_replica_restarts", "Times it was started again", labels=["replica"]
        )
        for replica in self._fleet.replicas:
            name = str(replica.index)
            up.add_metric([name], float(replica.is_up))
            restarts.add_metric([name], replica.restarts)
        routed = CounterMetricFamily(
            "tokenspeed_routed_requests",
            "Requests by replica and by why it was chosen: known, or new to all",
            labels=["replica", "reason"],
        )
        for (index, reason), count in sorted(self.routed.items()):
            routed.add_metric([str(index), reason], count)
        lost = CounterMetricFamily(
            "tokenspeed_replica_lost_requests", "Requests whose replica ended", labels=["replica"]
        )
        for index, count in sorted(self.lost.items()):
            lost.add_metric([str(index)], count)
        opened = GaugeMetricFamily("tokenspeed_router_connections", "Open connections")
        opened.add_metric([], self.num_open())
        refused = GaugeMetricFamily(
            "tokenspeed_router_connections_refused", "Connections that found no room"
        )
        refused.add_metric([], self.num_refused())
        yield from (up, restarts, routed, lost, opened, refused)


class _Collected:
    """Metrics that are gathered already."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        """All of them."""
        return self._metrics


def _merged(pages: Iterable[tuple[Replica, str]]) -> list[Metric]:
    """The metrics of all pages by name; a sample gets the number of its replica."""
    found: dict[str, Metric] = {}
    for replica, page in pages:
        for family in text_string_to_metric_families(page):
            metric = found.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            for sample in family.samples:
                labels = sample.labels | {"replica": str(replica.index)}
                metric.samples.append(sample._replace(labels=labels))
    return list(found.values())
