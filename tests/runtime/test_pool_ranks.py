"""Pools of several ranks, and what leaves of a prompt while it is computed."""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from threading import get_ident
from typing import Any

import httpx
import pytest
import torch
from bundles import write_bundle
from drafting import tokens_of
from pool_pairs import plan_of_two, pools, wait_for
from rank_forks import free_port, logs, start, wait

from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime import Engine, Request, SamplingParams
from tokenspeed_plan.runtime.execution.bound_programs import BoundPrograms
from tokenspeed_plan.runtime.pools.blocks import Copy
from tokenspeed_plan.runtime.pools.layer_launch import LayerLaunch
from tokenspeed_plan.runtime.pools.rank_reports import MAX_JOBS, RankReports, report_bytes
from tokenspeed_plan.runtime.pools.transport import Pending, Route, Transport

PROMPTS = [list(range(start, start + count)) for start, count in enumerate((200, 90, 17, 3), 40)]
NUM_LONG = 3  # of them are longer than a page
COUNT = 20
NEW = list(range(300, 320))  # tokens that a second turn adds


def two_pools(folder: Path, bundle: Path, prefill: int, decode: int) -> Plan:
    pair = {"prefill": prefill, "decode": decode, "answers": "return"}
    plan = write_bundle(bundle, folder, target={"count": prefill + decode}, disaggregation=pair)
    assert [pool.layout.num_ranks for pool in plan.pools] == [decode, prefill]
    return plan


@pytest.mark.slow
def test_two_ranks_hand_over_to_one(checkpoint: Any, tmp_path: Path) -> None:
    """The prefill pool's ranks are processes; each sends the heads that it has."""
    folder, bundle, port = checkpoint("moe"), tmp_path / "plan", free_port()
    plan = two_pools(folder, bundle, 2, 1)
    words = ["serve", bundle, "--pool", "prefill", "--listen", f"127.0.0.1:{port}"]
    ranks = start(2, [*words, "--peer-token", "t"], tmp_path)
    with pools(plan, folder) as made:
        handovers = made.connect([("127.0.0.1", port)])  # again and again, until it is there
        wait_for(lambda: handovers.num_peers == 1, made.engine, 60)
        wanted = tokens_of(Engine.from_plan(plan_of_two(folder), folder), PROMPTS, COUNT)
        assert tokens_of(made.engine, PROMPTS, COUNT) == wanted
        counts = handovers.counts
        assert counts.done == NUM_LONG and not counts.refused
        wait_for(lambda: made.engine.is_idle, made.engine)
        assert counts.returned == len(PROMPTS)
        later = [[*prompt, *ids, *NEW] for prompt, ids in zip(PROMPTS, wanted, strict=True)]
        before = counts.computed_tokens
        found = tokens_of(made.engine, later, COUNT)
        assert found == tokens_of(Engine.from_plan(plan_of_two(folder), folder), later, COUNT)
        assert counts.computed_tokens - before == len(PROMPTS) * len(NEW)
    os.kill(ranks[0].pid or 0, signal.SIGTERM)
    assert wait(ranks, 30) == [0, 0], logs(tmp_path, 2)


def ask_both(http: httpx.Client, folder: Path, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """The answers of a server, which are those of one pool."""
    wanted = tokens_of(Engine.from_plan(plan_of_two(folder), folder), prompts, COUNT)
    for prompt, answer in zip(prompts, wanted, strict=True):
        body = {"prompt": prompt, "max_tokens": COUNT, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        (choice,) = http.post("/v1/completions", json=body).json()["choices"]
        assert tuple(choice["token_ids"]) == answer
    return wanted


@pytest.mark.slow
def test_one_rank_hands_over_to_two(checkpoint: Any, tmp_path: Path) -> None:
    """The decode pool's ranks are processes; each gets the heads that it holds."""
    folder, bundle, port = checkpoint("moe"), tmp_path / "plan", free_port()
    plan = two_pools(folder, bundle, 1, 2)
    with pools(plan, folder, engine=False) as made:
        host, listens = made.add_prefill()
        words = ["serve", bundle, "--pool", "decode", "--peers", f"{host}:{listens}"]
        ranks = start(2, [*words, "--peer-token", "t", "--port", port, "--no-canary"], tmp_path)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            until = time.monotonic() + 60
            while "ready at" not in (tmp_path / "0.log").read_text():
                assert time.monotonic() < until, logs(tmp_path, 2)
                time.sleep(0.05)
            wanted = ask_both(http, folder, PROMPTS)
            assert f"tokenspeed_handovers_done {NUM_LONG}.0" in http.get("/metrics").text
            sent = f"tokenspeed_answers_returned {len(PROMPTS)}.0"
            wait_for(lambda: sent in http.get("/metrics").text)
            computed = made.prefills[0].metrics.computed_tokens
            ask_both(http, folder, [[*a, *b, *NEW] for a, b in zip(PROMPTS, wanted, strict=True)])
            computed = made.prefills[0].metrics.computed_tokens - computed
            assert computed == len(PROMPTS) * len(NEW)
        os.kill(ranks[0].pid or 0, signal.SIGTERM)
        assert wait(ranks, 30) == [0, 0], logs(tmp_path, 2)


class Spied:
    """A transport that notes what is pushed at once."""

    def __init__(self, inner: Transport, pushed: list[list[Copy]]) -> None:
        self.name, self.settle_s = inner.name, inner.settle_s
        self._inner, self._pushed = inner, pushed

    def describe(self) -> dict[str, Any]:
        return self._inner.describe()

    def reach(self, description: dict[str, Any]) -> Route:
        return _SpiedRoute(self._inner.reach(description), self._pushed)


class _SpiedRoute:
    def __init__(self, inner: Route, pushed: list[list[Copy]]) -> None:
        self._inner, self._pushed = inner, pushed

    def push(self, parts: Sequence[Copy]) -> Pending:
        self._pushed.append(list(parts))
        return self._inner.push(parts)

    def close(self) -> None:
        self._inner.close()


def test_each_layer_leaves_while_the_next_is_computed(checkpoint: Any) -> None:
    """Of each chunk as many pushes as layers with pages; of the last one those with states, too."""
    folder, pushed = checkpoint("moe"), list[list[Copy]]()
    plan = plan_of_two(folder)
    layers = plan.pools[1].programs[0].pushes
    with_pages = [push for push in layers if any("kv_cache" in name for name in push.buffers)]
    assert 0 < len(with_pages) < len(layers)
    with pools(plan, folder, lambda inner: Spied(inner, pushed)) as made:
        handovers = made.connect([made.add_prefill(chunk=48)])
        tokens_of(made.engine, [list(range(40, 137))], 2)  # 96 tokens: two chunks of whole pages
        assert handovers.counts.done == 1
        assert len(pushed) == len(with_pages) + len(layers)
        first = {copy.arena for parts in pushed[: len(with_pages)] for copy in parts}
        assert first == {"kv_cache"}
        sent = sum(copy.width * copy.rows for parts in pushed for copy in parts)
        assert sent == handovers.counts.size_bytes


def test_a_batch_that_leaves_layer_by_layer_is_planned_once(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Functions of libraries may need the host for each batch, however it is executed."""
    planned, times = list[int](), list[int]()
    run, begin = LayerLaunch.run, BoundPrograms.begin

    def counted(self: LayerLaunch, *args: Any) -> None:
        before = planned.count(get_ident())  # the other pool has a thread of its own
        run(self, *args)
        times.append(planned.count(get_ident()) - before)

    def noted(self: BoundPrograms, *args: Any) -> Any:
        planned.append(get_ident())
        return begin(self, *args)

    monkeypatch.setattr(LayerLaunch, "run", counted)
    monkeypatch.setattr(BoundPrograms, "begin", noted)
    folder = checkpoint("moe")
    with pools(plan_of_two(folder), folder) as made:
        handovers = made.connect([made.add_prefill(chunk=48)])
        tokens_of(made.engine, [list(range(40, 137))], 2)
        assert handovers.counts.done == 1
    assert len(times) > 1 and set(times) == {1}


def test_an_order_waits_for_the_steps_before_it(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a step that was launched may still write pages that are given to an order."""
    folder = checkpoint("moe")
    is_over = [False]

    class Event:
        def record(self) -> None:
            """As on a GPU."""

        def query(self) -> bool:
            return is_over[0]

    with pools(plan_of_two(folder), folder) as made:
        handovers = made.connect([made.add_prefill()])
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(handovers._ranks, "_is_on_gpu", True)
        made.engine.add(Request("0", tuple(range(40, 140)), SamplingParams(max_tokens=2)))
        wait_for(lambda: handovers.num_jobs == 1, made.engine)
        for _ in range(20):
            made.engine.step()
        assert made.prefills[0].metrics.computed_tokens == 0
        is_over[0] = True
        wait_for(lambda: handovers.counts.done == 1, made.engine)


def test_half_a_report_is_not_read() -> None:
    memory = mmap.mmap(-1, report_bytes(2))
    reports = RankReports(memory)
    assert reports.find(1, 0) is None and reports.find(1, 3) is None
    reports.leave(1, 3, 1 << 100)
    assert reports.find(1, 3) == (True, 1 << 100)
    assert reports.find(0, 3) is None and reports.find(1, 3 + MAX_JOBS) is None
    reports.leave(1, 3 + MAX_JOBS, None)
    assert reports.find(1, 3) is None
    assert reports.find(1, 3 + MAX_JOBS) == (False, 0)
    place = memory.find(bytes([3 + MAX_JOBS & 255, (3 + MAX_JOBS) >> 8]))
    memory[place + 9] ^= 1
    assert reports.find(1, 3 + MAX_JOBS) is None
