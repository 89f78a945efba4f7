"""The pages of a prefill pool: metrics under the decode pool's names, and how it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from drafting import tokens_of
from pool_pairs import Pools, plan_of_two, pools
from prometheus_client.parser import text_string_to_metric_families

from tokenspeed_plan.runtime.pools.handovers import Handovers
from tokenspeed_plan.runtime.pools.prefill_server import PrefillServer
from tokenspeed_plan.runtime.serving.async_engine import AsyncEngine
from tokenspeed_plan.runtime.serving.http import ServerOptions, listen
from tokenspeed_plan.runtime.serving.http.limiter import AdmissionLimiter
from tokenspeed_plan.runtime.serving.http.pool_status import PoolStatus, showing
from tokenspeed_plan.runtime.serving.http.prometheus import Metrics

PROMPT = list(range(40, 140))
OF_PREFILL = {"tokenspeed_decode_pools"}  # what a decode pool has no name for


@pytest.fixture(scope="module")
def folder(checkpoint: Any) -> Path:
    path: Path = checkpoint("moe")
    return path


@pytest.fixture
def pair(folder: Path) -> Iterator[tuple[Pools, Handovers, httpx.Client]]:
    """Two pools, and a client of the prefill pool's pages."""
    with pools(plan_of_two(folder), folder) as made:
        handovers = made.connect([made.add_prefill()])
        status = PoolStatus(made.prefills[0], made.servers[0], "m", 30.0)
        with listen("127.0.0.1", 0) as listener, showing(status, ServerOptions(), listener):
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with httpx.Client(base_url=url, timeout=10) as client:
                yield made, handovers, client


def values_of(text: str) -> dict[str, tuple[float, dict[str, str]]]:
    """Each sample with its labels; those of responses are added up."""
    found: dict[str, tuple[float, dict[str, str]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            before, _ = found.get(sample.name, (0.0, {}))
            found[sample.name] = before + sample.value, sample.labels
    return found


def test_what_both_pools_count_is_the_same(pair: tuple[Pools, Handovers, httpx.Client]) -> None:
    made, handovers, client = pair
    tokens_of(made.engine, [PROMPT, PROMPT[:70]], 2)
    found = values_of(client.get("/metrics").text)
    counts = handovers.counts
    assert counts.done == 2
    assert found["tokenspeed_handovers_done"][0] == counts.done
    assert found["tokenspeed_handover_bytes"][0] == counts.size_bytes
    handed_over = found["tokenspeed_prompt_tokens_total"][0]
    assert handed_over - found["tokenspeed_cached_prompt_tokens_total"][0] == counts.computed_tokens
    assert found["tokenspeed_decode_pools"][0] == 1
    assert (
        found["tokenspeed_handovers_in_flight"][0] == found["tokenspeed_handovers_failed"][0] == 0
    )
    assert found["vllm:prompt_tokens_total"] == (handed_over, {"model_name": "m"})


def test_names_and_labels_are_those_of_a_decode_pool(
    pair: tuple[Pools, Handovers, httpx.Client],
) -> None:
    made, _, client = pair
    limiter = AdmissionLimiter(AsyncEngine(made.engine), 8)
    decode = Metrics(made.engine, limiter, "m")
    decode.watch_connections(lambda: 0, lambda: 0)
    decode.respond("/metrics", 200)
    client.get("/metrics")
    theirs = values_of(decode.text().decode())
    own = values_of(client.get("/metrics").text)
    assert own.keys() - theirs.keys() == OF_PREFILL
    for name in own.keys() & theirs.keys():
        assert own[name][1].keys() == theirs[name][1].keys(), name


def test_it_says_how_it_is(
    pair: tuple[Pools, Handovers, httpx.Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, client = pair
    for page in ("/health", "/ready"):
        assert client.get(page).json() == {"status": "ok"}
        assert client.head(page).status_code == 200
    assert client.get("/v1/models").status_code == 404
    assert client.get("/health", headers={"Host": "elsewhere.example"}).status_code == 403
    with monkeypatch.context() as patch:
        patch.setattr(PrefillServer, "is_full", True)
        assert client.get("/ready").status_code == 429
        assert client.get("/health").status_code == 200
    monkeypatch.setattr(PrefillServer, "stands_s", 31.0)
    for page in ("/health", "/ready"):
        said = client.get(page)
        assert said.status_code == 503 and said.json()["error"]["code"] == "stalled"


def test_a_pool_that_moves_stands_for_a_beat_at_most(
    pair: tuple[Pools, Handovers, httpx.Client],
) -> None:
    made, _, _ = pair
    tokens_of(made.engine, [PROMPT], 2)
    assert made.servers[0].stands_s < 2
    made.stop_prefills()
    assert made.servers[0].stands_s >= 0
