"""A server among clients of all kinds: what it leaks, and what the bad ones cost the good ones.

    python benchmarks/soak.py plans/frozen/demo-cpu --minutes 30 --clients 64

Serves the plan to good clients among bad ones: cut streams, bad bodies, wrong keys, long prompts,
slow headers and bodies, bursts over the limit. Before and after that the good clients are alone,
for an eighth of the time each (at most 150 s), so that a machine that becomes slower counts for
both. Good clients send a request every few seconds whatever the answers take, from a process of
their own, so that the bad clients' work is not measured; on a machine where a request takes long,
all clients pause longer. Writes what it found as JSON, then four judgements: memory (flat within a
hundredth after the warm-up), leaks (requests, slots, pages, leases, descriptors), the latency of
good requests (p99 at most 1.5 x that without bad ones, every answer right), and the end. The exit
code is 1 where one of them is wrong.
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
MAX_P99_RATIO = 1.5
QUICK_S = 0.15  # a request alone; clients pause so much longer as it takes longer here


def http(url: str, key: str = KEY) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=60)


class Good:
    """Clients that want answers, and get the same one for the same prompt."""

    def __init__(self, client: httpx.AsyncClient, every_s: float) -> None:
        self.client = client
        self.every_s = every_s
        self.seconds: list[float] = []
        self.texts: dict[str, set[str]] = {}
        self.statuses: Counter[int] = Counter()

    async def run(self, number: int, until_s: float) -> None:
        rng = random.Random(number)
        next_s = time.monotonic() + rng.uniform(0, self.every_s)
        while next_s < until_s:
            await asyncio.sleep(max(next_s - time.monotonic(), 0))
            await self.ask(rng.choice(PROMPTS))
            next_s += self.every_s

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

    def found(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "statuses": self.statuses,
            "texts": {prompt: sorted(texts) for prompt, texts in self.texts.items()},
        }


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What good clients found in one or more processes."""
    ranked = sorted(second for part in parts for second in part["seconds"]) or [math.inf]
    statuses = sum((Counter(part["statuses"]) for part in parts), Counter[str]())
    return {
        "requests": len(ranked),
        "statuses": dict(statuses),
        "p50_s": round(statistics.median(ranked), 3),
        "p99_s": round(ranked[int(len(ranked) * 0.99)], 3),
    }


def num_wrong(parts: list[dict[str, Any]]) -> int:
    """Prompts that have more than one answer."""
    texts: dict[str, set[str]] = {}
    for part in parts:
        for prompt, found in part["texts"].items():
            texts.setdefault(prompt, set()).update(found)
    return sum(len(found) > 1 for found in texts.values())


async def be_good(url: str, seconds: float, every_s: float) -> dict[str, Any]:
    async with http(url) as client:
        good = Good(client, every_s)
        until_s = time.monotonic() + seconds
        await asyncio.gather(*(good.run(number, until_s) for number in range(GOOD_CLIENTS)))
        return good.found()


def pace_of(url: str) -> float:
    """How much longer than on a quick machine clients pause here; at least 1."""

    async def ask() -> list[float]:
        async with http(url) as client:
            good = Good(client, 0)
            for prompt in 2 * PROMPTS:
                await good.ask(prompt)
            return good.seconds

    seconds = asyncio.run(ask())
    return max(statistics.median(seconds) / QUICK_S, 1)


class Bad:
    """A client that does one bad thing after the other."""

    def __init__(
        self, client: httpx.AsyncClient, seen: Counter[str], number: int, pause_s: float
    ) -> None:
        self.client = client
        self.seen = seen
        self.pause_s = pause_s
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
            await asyncio.sleep(self.rng.uniform(0, 2 * self.pause_s))

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


async def be_bad(url: str, seconds: float, clients: int, pause_s: float) -> Counter[str]:
    seen: Counter[str] = Counter()
    until_s = time.monotonic() + seconds
    async with http(url) as client:
        every = [Bad(client, seen, number, pause_s) for number in range(clients)]
        await asyncio.gather(*(bad.run(until_s) for bad in every))
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

    def files(self) -> Counter[str]:
        """What its descriptors are open on, without numbers."""
        found: Counter[str] = Counter()
        folder = Path(f"/proc/{self.process.pid}/fd")
        for name in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                found[re.sub(r"\d+", "N", os.readlink(folder / name))] += 1
        return found

    def metrics(self) -> dict[str, float]:
        text = httpx.get(f"{self.url}/metrics").text
        return {name: float(value) for name, value in re.findall(r"^tokenspeed_(\w+) (.*)$", text, re.M)}  # fmt: skip  # noqa: E501

    def left(self, files: Counter[str]) -> dict[str, float]:
        """What is still in use a while after the last client; descriptors beside `files`."""
        until_s = time.monotonic() + 20
        while True:
            found = {name: value for name, value in self.metrics().items() if name in IN_USE}
            found |= {f"file {name}": count for name, count in (self.files() - files).items()}
            if not any(found.values()) or time.monotonic() > until_s:
                return found
            time.sleep(0.2)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def good_process(url: str, seconds: float, pace: float) -> subprocess.Popen[str]:
    every_s = str(GOOD_EVERY_S * pace)
    command = [sys.executable, __file__, url, "--good-for", str(seconds), every_s]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def bad_process(url: str, seconds: float, clients: int, pace: float) -> subprocess.Popen[str]:
    """The bad clients; others come first where processors are few: the server's work counts."""
    options = [str(seconds), str(BAD_EVERY_S * pace), "--clients", str(clients)]
    command = ["nice", "-n", "19", sys.executable, __file__, url, "--bad-for", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def result_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    text, _ = process.communicate()
    return dict(json.loads(text))


def watch(served: Served, process: subprocess.Popen[str]) -> list[float]:
    """The server's resident memory every second until a process ends, in MiB."""
    memory = []
    while process.poll() is None:
        memory.append(served.resident_mib())
        time.sleep(1)
    return memory


def growth(memory: list[float]) -> float:
    """Of the memory after the warm-up, the last tenth over the first one."""
    warm = memory[int(len(memory) * WARM_UP) :]
    tenth = max(len(warm) // 10, 1)
    return statistics.median(warm[-tenth:]) / statistics.median(warm[:tenth]) - 1


def soak(bundle: str, seconds: float, clients: int, folder: Path) -> dict[str, Any]:
    served = Served(bundle, folder / "server.log")
    try:
        pace = pace_of(served.url)
        alone_s = min(150, seconds / 8)
        alone = [result_of(good_process(served.url, alone_s, pace))]
        files = served.files()  # with what the first requests open for good
        good = good_process(served.url, seconds, pace)
        bad = bad_process(served.url, seconds, clients - GOOD_CLIENTS, pace)
        memory, seen = watch(served, bad), result_of(bad)
        among = [result_of(good)]
        left = served.left(files)
        alone.append(result_of(good_process(served.url, alone_s, pace)))
        report = {
            "seconds": seconds,
            "clients": clients,
            "pace": round(pace, 2),
            "good_alone": merged(alone),
            "good_among_bad": merged(among),
            "prompts_with_two_answers": num_wrong(alone + among),
            "resident_mib": [round(value, 1) for value in memory[:: max(len(memory) // 30, 1)]],
            "resident_growth": round(growth(memory), 4),
            "left_in_use": left,
            "bad": dict(sorted(seen.items())),
        }
        code = served.end()
        return report | {"exit_code": code, "log": served.log.read_text().splitlines()}
    finally:
        served.process.kill()
        served.process.wait()


def judgements(report: dict[str, Any]) -> dict[str, tuple[bool, str]]:
    """Whether each of the four is right, and its figures."""
    alone, among = report["good_alone"], report["good_among_bad"]
    ratio = among["p99_s"] / alone["p99_s"]
    wrong = report["prompts_with_two_answers"]
    others = set(alone["statuses"]) | set(among["statuses"])
    others -= {"200", "429"}
    left = {name: value for name, value in report["left_in_use"].items() if value}
    code, lines = report["exit_code"], len(report["log"])
    return {
        "memory": (
            abs(report["resident_growth"]) <= MAX_GROWTH,
            f"resident memory changed by {report['resident_growth']:.2%} after the warm-up, "
            f"at most {MAX_GROWTH:.0%}",
        ),
        "leaks": (not left, f"in use after the last client: {left or 'nothing'}"),
        "latency": (
            ratio <= MAX_P99_RATIO and not wrong and not others,
            f"p99 of good requests {among['p99_s']} s among bad ones, {alone['p99_s']} s alone: "
            f"{ratio:.2f} x, at most {MAX_P99_RATIO} x; {wrong} prompts with two answers; "
            f"statuses beside 200 and 429: {sorted(others) or 'none'}",
        ),
        "end": (code == 0 and lines <= 2, f"exit code {code}, {lines} lines of log, at most 2"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--good-for", type=float, nargs=2, help=argparse.SUPPRESS)  # of a server
    parser.add_argument("--bad-for", type=float, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bad_for:
        seconds, pause_s = options.bad_for
        seen = asyncio.run(be_bad(options.bundle, seconds, options.clients, pause_s))
        print(json.dumps(seen))
        return 0
    if options.good_for:
        print(json.dumps(asyncio.run(be_good(options.bundle, *options.good_for))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        report = soak(options.bundle, 60 * options.minutes, options.clients, Path(folder))
    print(json.dumps(report, indent=1))
    found = judgements(report)
    for name, (is_right, figures) in found.items():
        print(f"{'right' if is_right else 'WRONG'}  {name}: {figures}")
    return int(not all(is_right for is_right, _ in found.values()))


if __name__ == "__main__":
    sys.exit(main())
