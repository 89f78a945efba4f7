"""The router before replicas that are killed, full, restarted: what clients see."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ROOT
from serving import KEY, serving

from tokenspeed_plan.runtime.serving.router.fleet import Replica

SUPPORT = ROOT / "tests" / "support"
COUNT = 3


class RunningRouter:
    """A router in a process of its own."""

    def __init__(self, log: Path, *args: object) -> None:
        self.log = log
        command = [sys.executable, str(SUPPORT / "router_fake.py"), *map(str, args)]
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stderr=file)
        url = self._wait_for(r"ready at (http://\S+)/v1")
        self.http = httpx.Client(base_url=url, timeout=20)

    def _wait_for(self, pattern: str, seconds: float = 30) -> str:
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            if found := re.search(pattern, self.text()):
                return found[1]
            time.sleep(0.02)
        raise AssertionError(f"no `{pattern}` in: {self.text()}")

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def ask(self, **body: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 1} | body)

    def stream(self, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
        """The events of a stream; the last one is None where it ended well."""
        body = {"prompt": "abc", "max_tokens": 20, "stream": True} | body
        events = []
        with self.http.stream("POST", path, json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    text = line.removeprefix("data: ")
                    events.append(None if text == "[DONE]" else json.loads(text))
        return events

    def metric(self, name: str) -> dict[str, float]:
        lines = self.http.get("/metrics").text.splitlines()
        found = {}
        for line in lines:
            if match := re.match(rf'{name}{{.*replica="(\d+)".*}} (\S+)', line):
                found[match[1]] = found.get(match[1], 0.0) + float(match[2])
        return found

    def wait_until_up(self, count: int = COUNT) -> None:
        until = time.monotonic() + 20
        while self.http.get("/health").json().get("up") != count:
            assert time.monotonic() < until
            time.sleep(0.05)

    def end(self) -> int:
        self.http.close()
        self.process.terminate()
        return self.process.wait(20)


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRouter]:
    running = RunningRouter(tmp_path_factory.mktemp("router") / "log", COUNT)
    yield running
    assert running.end() == 0


@pytest.mark.parametrize(
    "said",
    [
        {"headers": {"x-session-id": "a"}},
        {"body": {"user": "a"}},
        {"body": {"prompt_cache_key": "b"}},
        {"body": {"metadata": {"user_id": "c"}}},
        {"body": {"prompt": "a prompt of more than one page of tokens " * 4}},
    ],
)
def test_turns_of_a_conversation_meet_one_replica(
    router: RunningRouter, said: dict[str, Any]
) -> None:
    router.wait_until_up()
    body = {"prompt": "x", "max_tokens": 1} | said.get("body", {})
    found = set()
    for turn in range(12):
        body["prompt"] += f" and turn {turn}"
        answer = router.http.post("/v1/completions", json=body, headers=said.get("headers"))
        found.add(answer.json()["process"])
    assert len(found) == 1


def test_many_sessions_are_spread(router: RunningRouter) -> None:
    router.wait_until_up()
    found = {router.ask(user=f"user-{number}").json()["process"] for number in range(40)}
    assert len(found) == COUNT


def test_whole_events_come_through(router: RunningRouter) -> None:
    events = router.stream()
    assert [event["number"] for event in events[:-1]] == list(range(20)) and events[-1] is None


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
def test_a_killed_replica_ends_its_streams_alone(router: RunningRouter, path: str) -> None:
    """Its own streams say so, those of others go on, new turns go elsewhere, and it comes back."""
    router.wait_until_up()
    results: dict[str, list[Any]] = {}

    def read(user: str) -> None:
        body = {"user": user, "max_tokens": 60}
        if path == "/v1/messages":
            body = {"metadata": {"user_id": user}, "max_tokens": 60}
        results[user] = router.stream(path, **body)

    threads = [threading.Thread(target=read, args=(f"u{number}",)) for number in range(12)]
    for thread in threads:
        thread.start()
    time.sleep(0.4)
    victim = router.ask(user="u0").json()["process"]
    os.kill(victim, signal.SIGKILL)
    again = router.ask(user="u0").json()["process"]
    for thread in threads:
        thread.join()
    assert again != victim
    hurt = {user for user, events in results.items() if events[0]["process"] == victim}
    assert "u0" in hurt and len(hurt) < 12
    for user, events in results.items():
        if user in hurt:
            error = events[-1]["error"]
            assert "ended while it answered" in error["message"] and len(events) < 60
        else:
            assert events[-1] is None and len(events) == 61
    router.wait_until_up()
    assert sum(router.metric("tokenspeed_replica_restarts_total").values()) >= 1
    assert "was killed by SIGKILL; it is started again" in router.text()


def test_an_answer_that_had_not_begun_comes_from_another(router: RunningRouter) -> None:
    router.wait_until_up()
    home = router.ask(user="k").json()["process"]
    routed = router.metric("tokenspeed_routed_requests_total")
    for index in range(COUNT):  # the replica that has this number kills itself
        answer = router.ask(user="k", model=f"kill-{index}")
        assert answer.status_code == 200
        if answer.json()["process"] != home:
            break
    else:
        raise AssertionError("no replica was killed")
    assert sum(router.metric("tokenspeed_routed_requests_total").values()) > sum(routed.values())
    router.wait_until_up()


def test_a_full_replica_is_not_the_last_word(router: RunningRouter) -> None:
    router.wait_until_up()
    before = sum(router.metric("tokenspeed_requests_finished_total").values())
    assert router.ask(model="full").status_code == 429
    assert sum(router.metric("tokenspeed_requests_finished_total").values()) == before + 2


def test_metrics_have_the_number_of_their_replica(router: RunningRouter) -> None:
    router.wait_until_up()
    assert set(router.metric("tokenspeed_requests_finished_total")) == {"0", "1", "2"}
    assert router.metric("tokenspeed_replica_up") == {"0": 1, "1": 1, "2": 1}


def test_a_client_that_leaves_frees_its_replica(router: RunningRouter) -> None:
    router.wait_until_up()
    with pytest.raises(httpx.ReadTimeout):
        router.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 100}, timeout=0.2)
    with router.http.stream(
        "POST", "/v1/completions", json={"prompt": "a", "max_tokens": 500, "stream": True}
    ) as response:
        next(response.iter_raw())
    for number in range(30):  # with loads that are not freed, this would not stay in bounds
        assert router.ask(user=f"n{number}").status_code == 200


def test_a_rolling_restart_loses_no_stream(router: RunningRouter) -> None:
    router.wait_until_up()
    restarts = router.metric("tokenspeed_replica_restarts_total")
    done, wrong = threading.Event(), []

    def read(user: str) -> None:
        while not done.is_set():
            events = router.stream(user=user, max_tokens=10)
            if events[-1] is not None or len(events) != 11:
                wrong.append(events)

    threads = [threading.Thread(target=read, args=(f"r{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    router.process.send_signal(signal.SIGHUP)
    until = time.monotonic() + 30
    while "all replicas were restarted" not in router.text():
        assert time.monotonic() < until
        time.sleep(0.05)
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong
    after = router.metric("tokenspeed_replica_restarts_total")
    assert {name: after[name] - restarts[name] for name in after} == {"0": 1, "1": 1, "2": 1}


def test_a_key_and_the_end(tmp_path: Path) -> None:
    """Without the key nothing is done; a signal lets a stream end, and takes no more."""
    router = RunningRouter(tmp_path / "log", 2, "sk-key")
    assert router.ask().status_code == 401
    right = {"Authorization": "Bearer sk-key"}
    assert router.http.get("/health").status_code == 200
    router.http.headers.update(right)
    assert router.ask().json()["key"] == "Bearer sk-key"
    events: list[Any] = []
    thread = threading.Thread(target=lambda: events.extend(router.stream(max_tokens=40)))
    thread.start()
    time.sleep(0.3)
    router.process.terminate()
    time.sleep(0.2)
    refused = httpx.post(f"{router.http.base_url}/v1/completions", json={}, headers=right)
    assert refused.status_code == 503 and "shutting down" in refused.text
    thread.join()
    assert len(events) == 41 and events[-1] is None
    assert router.process.wait(20) == 0
    router.http.close()


def test_a_page_of_another_site_is_refused(router: RunningRouter) -> None:
    assert router.http.get("/health", headers={"Host": "evil.example"}).status_code == 403


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        (["loading", "error: no memory", "", "hint: less"], "no memory"),
        (["Traceback", "ImportError: no such name", ""], "ImportError: no such name"),
        ([], "it said nothing"),
    ],
)
def test_what_a_replica_said_last_is_known(printed: list[str], said: str) -> None:
    replica = Replica(0)
    replica.printed.extend(printed)
    assert replica.last_error == said


@pytest.mark.slow
def test_two_engines_of_the_demo_model(tmp_path: Path) -> None:
    """The command itself: replicas with engines, a prefix that is known, one page of metrics."""
    bundle = ROOT / "plans/frozen/demo-cpu"
    with serving(bundle, tmp_path, "--replicas", 2, "--api-key", KEY) as server:
        prompt, homes = "def fibonacci(n):\n    # the numbers of a rabbit farm\n" * 4, []
        for turn in range(3):
            body = {"prompt": prompt, "max_tokens": 8, "temperature": 0}
            answer = server.http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            homes.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
            prompt += answer.json()["choices"][0]["text"] + f"\n# turn {turn}\n"
        assert homes[0] == 0 and homes[1] > 0 and homes[2] > homes[1]
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "user": "u"}
        answer = server.http.post("/v1/chat/completions", json=chat)
        assert answer.status_code == 200, answer.text
        assert server.metric("requests_finished_total") == 4
        assert server.http.get("/v1/models").json()["data"][0]["id"]
        assert server.http.post("/v1/completions", json={"prompt": 1}).status_code == 400
        server.signal()
        assert server.wait() == 0
