"""A server among clients of all kinds: what it leaks, and what the bad ones cost the good ones.

    python benchmarks/soak.py plans/frozen/demo-cpu --minutes 30 --clients 64

Serves the plan, first to good clients alone for a quarter of the time (at most 5 minutes), then to
the same ones among bad clients: cut streams, bad bodies, wrong keys, long prompts, slow headers and
bodies, bursts over the limit. Good clients send a request every few seconds whatever the answers
take, from a process of their own, so that the bad clients' work is not measured. Writes what it
found as JSON; exits with 1 where something is left in use at the end, an answer is wrong, or the
server's memory grows by more than a hundredth after its warm-up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx

KEY = "sk-soak"
SERVE = (sys.executable, "-c", "from tokenspeed_plan.planner.cli import main; main()", "serve")
QUIET_THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
IN_USE = ("requests_waiting", "requests_running", "requests_in_flight", "state_slots_used",
          "kv_pages_used")  # fmt: skip
PROMPTS = ("def add(a, b):", "import os\n", "class Queue:", "try:\n    import json\n")
GOOD_CLIENTS = 8
GOOD_EVERY_S = 4.0
GOOD_TOKENS = 16
BAD_EVERY_S = 1.0
WARM_UP = 1 / 6  # of the time: 5 of 30 minutes
MAX_GROWTH = 0.01


def http(url: str, key: str = KEY) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=60)


class Good:
    """Clients that want answers, and get the same one for the same prompt."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client
        self.seconds: list[float] = []
        self.texts: dict[str, set[str]] = {}
        self.statuses: Counter[int] = Counter()

    async def run(self, number: int, until_s: float) -> None:
        rng = random.Random(number)
        next_s = time.monotonic() + rng.uniform(0, GOOD_EVERY_S)
        while next_s < until_s:
            await asyncio.sleep(max(next_s - time.monotonic(), 0))
            await self.ask(rng.choice(PROMPTS))
            next_s += GOOD_EVERY_S

    async def ask(self, prompt: str) -> None:
        """As OpenAI's clients do, again where the server says so; all of it is the latency."""
        begun = time.monotonic()
        body = {"prompt": prompt, "max_tokens": GOOD_TOKENS, "temperature": 0}
        while True:
            try:
                found = await self.client.post("/v1/completions", json=body)
            except httpx.TransportError:
                self.statuses[0] += 1  # the server has closed the connection, or is gone
                return
            self.statuses[found.status_code] += 1
            if "retry-after" not in found.headers:
                break
            await asyncio.sleep(0.2)
        self.seconds.append(time.monotonic() - begun)
        if found.status_code == 200:
            self.texts.setdefault(prompt, set()).add(found.json()["choices"][0]["text"])

    def report(self) -> dict[str, Any]:
        ranked = sorted(self.seconds) or [math.inf]
        return {
            "requests": len(ranked),
            "statuses": dict(self.statuses),
            "p50_s": round(statistics.median(ranked), 3),
            "p99_s": round(ranked[int(len(ranked) * 0.99)], 3),
            "wrong": sum(len(found) > 1 for found in self.texts.values()),
        }


async def be_good(url: str, seconds: float) -> dict[str, Any]:
    async with http(url) as client:
        good = Good(client)
        until_s = time.monotonic() + seconds
        await asyncio.gather(*(good.run(number, until_s) for number in range(GOOD_CLIENTS)))
        return good.report()


class Bad:
    """A client that does one bad thing after the other."""

    def __init__(self, client: httpx.AsyncClient, seen: Counter[str], number: int) -> None:
        self.client = client
        self.seen = seen
        self.rng = random.Random(number)

    async def run(self, until_s: float) -> None:
        deeds: tuple[Callable[[], Awaitable[object]], ...] = (
            self.cut_a_stream,
            self.leave_before_the_answer,
            self.send_nonsense,
            self.send_too_much,
            self.use_a_wrong_key,
            self.send_a_long_prompt,
            self.send_a_slow_header,
            self.send_a_slow_body,
            self.read_nothing,
            self.ask_for_too_many,
        )
        while time.monotonic() < until_s:
            deed = self.rng.choice(deeds)
            try:
                result = await deed()
            except (httpx.TransportError, OSError) as error:
                result = type(error).__name__
            self.seen[f"{deed.__name__}: {result}"] += 1
            await asyncio.sleep(self.rng.uniform(0, 2 * BAD_EVERY_S))

    async def post(self, **body: Any) -> int:
        found = await self.client.post("/v1/completions", json={"prompt": "a"} | body)
        return found.status_code

    async def cut_a_stream(self) -> int:
        body = {"prompt": self.rng.choice(PROMPTS), "max_tokens": 64, "stream": True}
        left = self.rng.randrange(1, 8)
        async with self.client.stream("POST", "/v1/completions", json=body) as response:
            async for _ in response.aiter_lines():
                left -= 1
                if left < 0:
                    break
            return response.status_code

    async def leave_before_the_answer(self) -> None:
        with contextlib.suppress(httpx.TimeoutException):
            await self.client.post(
                "/v1/completions", json={"prompt": "a", "max_tokens": 64}, timeout=0.05
            )

    async def send_nonsense(self) -> int:
        raw = self.rng.choice(
            (b"", b"{", b"[1]", b"\xff", b'{"prompt": NaN}', b'{"prompt": "a", "stop": "\\ud800"}',
             b'{"prompt": "a", "stop_token_ids": [2147483648]}', b'{"model": "\\ud83d"}')
        )  # fmt: skip
        headers = {"Content-Type": "application/json"}
        found = await self.client.post("/v1/completions", content=raw, headers=headers)
        return found.status_code

    async def send_too_much(self) -> int:
        found = await self.client.post("/v1/completions", content=b"x" * (9 << 20))
        return found.status_code

    async def use_a_wrong_key(self) -> int:
        headers = {"Authorization": "Bearer nonsense"}
        found = await self.client.post("/v1/completions", json={}, headers=headers)
        return found.status_code

    async def send_a_long_prompt(self) -> int:
        return await self.post(prompt="x" * self.rng.choice((10_000, 100_000, 1_000_000)))

    async def ask_for_too_many(self) -> int:
        prompts = [[1]] * self.rng.choice((3, 30, 3000))
        return await self.post(prompt=prompts, n=128, max_tokens=1)

    async def send_a_slow_header(self) -> None:
        await self.send_raw(b"GET /health HTTP/1.1\r\nHost: x\r\n")

    async def send_a_slow_body(self) -> None:
        await self.send_raw(b"%b{" % self.head("/v1/completions", 1000))

    async def read_nothing(self) -> None:
        """Ask again and again; the answers fill the sockets' buffers."""
        body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
        await self.send_raw(self.head("/v1/completions", len(body)) + body)

    async def send_raw(self, data: bytes) -> None:
        """Send something, and leave after a while, or when the server does."""
        url = self.client.base_url
        found = socket.socket()
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        found.setblocking(False)
        await asyncio.get_running_loop().sock_connect(found, (url.host, url.port))
        _, writer = await asyncio.open_connection(sock=found)
        writer.write(data)
        await asyncio.sleep(self.rng.uniform(0, 8))
        writer.transport.abort()

    def head(self, path: str, size: int) -> bytes:
        fields = (f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}",
                  "Content-Type: application/json", f"Content-Length: {size}", "\r\n")  # fmt: skip
        return "\r\n".join(fields).encode()


async def be_bad(url: str, seconds: float, clients: int) -> Counter[str]:
    seen: Counter[str] = Counter()
    until_s = time.monotonic() + seconds
    async with http(url) as client:
        await asyncio.gather(*(Bad(client, seen, number).run(until_s) for number in range(clients)))
    return seen


class Served:
    """`tokenspeed serve` in a process of its own."""

    def __init__(self, bundle: str, log: Path) -> None:
        options = ("--port", "0", "--api-key", KEY, "--no-canary", "--header-timeout", "5",
                   "--body-timeout", "5", "--write-timeout", "5")  # fmt: skip
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*SERVE, bundle, *options], stdout=file, stderr=file, env=QUIET_THREADS | os.environ
            )
        while not (found := re.search(r"ready at (http://\S+)/v1", log.read_text())):
            if self.process.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.1)
        self.url = found[1]

    def resident_mib(self) -> float:
        if self.process.poll() is not None:
            raise SystemExit(f"the server has ended: {self.log.read_text()}")
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]

    def num_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def metrics(self) -> dict[str, float]:
        text = httpx.get(f"{self.url}/metrics").text
        return {name: float(value) for name, value in re.findall(r"^tokenspeed_(\w+) (.*)$", text, re.M)}  # fmt: skip  # noqa: E501

    def left(self, num_files: int = 0) -> dict[str, float]:
        """What is still in use a while after the last client; files beside `num_files`."""
        until_s = time.monotonic() + 20
        while True:
            found = {name: value for name, value in self.metrics().items() if name in IN_USE}
            found["files"] = max(self.num_files() - num_files, 0)
            if not any(found.values()) or time.monotonic() > until_s:
                return found
            time.sleep(0.2)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def good_process(url: str, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, url, "--good-for", str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def result_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    text, _ = process.communicate()
    return dict(json.loads(text))


async def watch(served: Served, seconds: float, clients: int) -> tuple[list[float], Counter[str]]:
    """Let bad clients loose; returns the server's resident memory every second, in MiB."""
    bad = asyncio.create_task(be_bad(served.url, seconds, clients))
    memory = []
    while not bad.done():
        memory.append(served.resident_mib())
        await asyncio.sleep(1)
    return memory, bad.result()


def growth(memory: list[float]) -> float:
    """Of the memory after the warm-up, the last tenth over the first one."""
    warm = memory[int(len(memory) * WARM_UP) :]
    tenth = max(len(warm) // 10, 1)
    return statistics.median(warm[-tenth:]) / statistics.median(warm[:tenth]) - 1


def soak(bundle: str, seconds: float, clients: int, folder: Path) -> dict[str, Any]:
    served = Served(bundle, folder / "server.log")
    try:
        files = served.num_files()
        alone = result_of(good_process(served.url, min(300, seconds / 4)))
        good = good_process(served.url, seconds)
        memory, seen = asyncio.run(watch(served, seconds, clients - GOOD_CLIENTS))
        among = result_of(good)
        left = served.left(files)
        report = {
            "seconds": seconds,
            "good_alone": alone,
            "good_among_bad": among,
            "p99_ratio": round(among["p99_s"] / alone["p99_s"], 2),
            "resident_mib": [round(value, 1) for value in memory[:: max(len(memory) // 30, 1)]],
            "resident_growth": round(growth(memory), 4),
            "left_in_use": left,
            "bad": dict(sorted(seen.items())),
        }
        code = served.end()
        return report | {"exit_code": code, "log_lines": len(served.log.read_text().splitlines())}
    finally:
        served.process.kill()
        served.process.wait()


def faults(report: dict[str, Any]) -> list[str]:
    found = []
    if any(report["left_in_use"].values()):
        found.append("something is left in use")
    if report["good_alone"]["wrong"] or report["good_among_bad"]["wrong"]:
        found.append("a prompt has two answers")
    if report["resident_growth"] > MAX_GROWTH:
        found.append(f"resident memory grows by more than {MAX_GROWTH:.0%}")
    if set(report["good_among_bad"]["statuses"]) - {"200", "429"}:
        found.append("a good request was not answered")
    if report["exit_code"] or report["log_lines"] > 2:
        found.append("the server does not end in order, or its log is long")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--good-for", type=float, help=argparse.SUPPRESS)  # seconds, of a server
    options = parser.parse_args()
    if options.good_for:
        print(json.dumps(asyncio.run(be_good(options.bundle, options.good_for))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        report = soak(options.bundle, 60 * options.minutes, options.clients, Path(folder))
    report["faults"] = faults(report)
    print(json.dumps(report, indent=1))
    return int(bool(report["faults"]))


if __name__ == "__main__":
    sys.exit(main())
