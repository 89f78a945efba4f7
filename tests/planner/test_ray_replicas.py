"""Replicas at places of a cluster: to the router they are as processes of this host."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from conftest import ROOT
from scripted_ray import RayError, ScriptedRay

from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.planner.commands import ray_replicas
from tokenspeed_plan.planner.commands.ray_actor import SentPlan
from tokenspeed_plan.planner.commands.ray_cluster import pack
from tokenspeed_plan.planner.commands.ray_replicas import RayLife, ReplicaActor
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.runtime.serving.router import Launch
from tokenspeed_plan.runtime.serving.router.fleet import Fleet

BUNDLE = ROOT / "plans" / "frozen" / "demo-cpu"
REPLICA = ROOT / "tests" / "support" / "fake_replica.py"


class Handle:
    """An actor on a thread of this process, until its node is lost."""

    def __init__(self, actor: ReplicaActor, threads: ThreadPoolExecutor) -> None:
        self._actor = actor
        self._threads = threads
        self.is_lost = False

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args: self._call(getattr(self._actor, name), *args))

    async def _answer(self, answer: Awaitable[Any]) -> Any:
        found = await answer
        if self.is_lost:
            raise RayError
        return found

    def _call(self, method: Callable[..., Any], *args: Any) -> Any:
        loop = asyncio.get_running_loop()
        call = loop.run_in_executor(self._threads, method, *args)
        return loop.create_task(self._answer(call))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SentPlan:
    monkeypatch.setenv("TOKENSPEED_PLANS", str(tmp_path))
    ray = ScriptedRay([])
    ray.kill = lambda handle: None  # type: ignore[attr-defined]
    ray.util = SimpleNamespace(  # type: ignore[attr-defined]
        get_node_ip_address=lambda: "127.0.0.1"
    )
    ray.enter(monkeypatch)
    monkeypatch.setattr(ray_replicas, "_WAIT_S", 0.05)
    command = [sys.executable, str(REPLICA), "fake"]
    monkeypatch.setattr(ray_replicas, "own_command", lambda words: [*command, *words])
    return pack(BUNDLE, load_plan(BUNDLE))


async def until(happens: Callable[[], object], seconds: float = 20) -> None:
    end_s = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end_s
        await asyncio.sleep(0.02)


def test_a_replica_is_lost_restarted_and_ended(sent: SentPlan) -> None:
    """One is killed, one goes with its node; both come back. Then all restart, and end."""
    handles: list[Handle] = []
    lost: list[int] = []

    async def drive(threads: ThreadPoolExecutor) -> None:
        async def start(index: int) -> RayLife:
            handle = Handle(ReplicaActor(), threads)
            handles.append(handle)
            handle.start.remote(sent, [], {"REPLICA": str(index)})
            return RayLife(handle)

        async with httpx.AsyncClient(trust_env=False) as client:
            fleet = Fleet(Launch(2, start, 5.0), client, lost.append)
            fleet.begin()
            await asyncio.wait_for(fleet.all_ready.wait(), 20)
            first = {replica.url for replica in fleet.replicas}
            answer = await client.post(f"{fleet.replicas[0].url}/v1/completions", json={})
            os.kill(answer.json()["process"], signal.SIGKILL)
            handles[1].is_lost = True
            handles[1].signal.remote(int(signal.SIGKILL))
            await until(lambda: [each.restarts for each in fleet.replicas] == [1, 1])
            await until(lambda: fleet.up == [0, 1])
            assert sorted(lost) == [0, 1] and len(handles) == 4
            assert not first & {replica.url for replica in fleet.replicas}
            await fleet.restart_all(lambda replica: 0)
            assert fleet.up == [0, 1] and len(handles) == 6
            await fleet.end()
            assert all(replica.life and replica.life.has_ended for replica in fleet.replicas)

    with ThreadPoolExecutor(16) as threads:
        asyncio.run(drive(threads))


def test_what_a_node_says_of_its_plan_is_the_error(sent: SentPlan) -> None:
    """A node that cannot take the plan ends the start, with what is wrong."""

    async def drive(threads: ThreadPoolExecutor) -> str:
        async def start(index: int) -> RayLife:
            handle = Handle(ReplicaActor(), threads)
            handle.start.remote(SentPlan("0" * 64, "/none", b"no archive", "plan.json"), [], {})
            return RayLife(handle)

        async with httpx.AsyncClient() as client:
            fleet = Fleet(Launch(1, start, 5.0), client, lambda index: None)
            fleet.begin()
            await until(lambda: fleet.error)
            await fleet.end()
        return str(fleet.error)

    with ThreadPoolExecutor(4) as threads:
        assert "replica 0 did not start: the plan that was sent is damaged" in asyncio.run(
            drive(threads)
        )


def test_a_replica_is_the_same_command_with_another_address(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ray = ScriptedRay([], {"CPU": 8.0})
    ray.put = lambda value: value  # type: ignore[attr-defined]
    ray.init = lambda *args, **more: None  # type: ignore[attr-defined]
    ray.shutdown = lambda: None  # type: ignore[attr-defined]
    ray.enter(monkeypatch)
    monkeypatch.setattr("tokenspeed_plan.planner.commands.ray_cluster.find_spec", lambda name: True)
    found: dict[str, Any] = {}

    def started(place: Any, resources: Any, sent: Any, args: Any, environment: Any) -> Any:
        found.update(args=list(args), key=environment["TOKENSPEED_API_KEY"])
        raise ConnectionAbortedError

    monkeypatch.setattr(ray_replicas, "_started", started)

    def run(options: Any, *more: Any) -> None:
        with pytest.raises(ConnectionAbortedError):
            asyncio.run(options.launch.start(3))
        assert options.launch.count == 8 and options.launch.key == found["key"]

    monkeypatch.setattr("tokenspeed_plan.runtime.serving.router.serve_replicas", run)
    words = ["serve", str(BUNDLE), "--port", "0", "--ray", "auto", "--replicas", "8"]
    done = CliRunner().invoke(main, [*words, "--drain", "7", "--no-canary"])
    assert done.exit_code == 0, done.output
    weights = str((ROOT / "examples/demo/model").resolve())
    assert found["args"] == ["--drain", "7.0", "--no-canary", "--weights", weights]
    assert len(found["key"]) > 32  # replicas want a key even where the router's clients need none
    done = CliRunner().invoke(main, [*words[:-1], "9"])
    assert done.exit_code == 2 and "room for 8 engines" in done.output
