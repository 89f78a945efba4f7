"""Many clients that misbehave at once; checks their answers, and that nothing stays in use.

python tests/support/server_load.py http://127.0.0.1:8000 --key KEY --seconds 60 --clients 64
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import httpx

PROMPTS = ("def add(a, b):", "import os\n", "class Queue:", "try:\n    import json\n")
IN_USE = (
    "requests_waiting",
    "requests_running",
    "requests_in_flight",
    "state_slots_used",
    "kv_pages_used",
)


@dataclass
class Tally:
    """What the clients saw; `faults` is empty when all is well."""

    seen: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    texts: dict[tuple[str, int], str] = field(default_factory=dict)
    tokens: int = 0
    worst_ttft_s: float = 0.0

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            self.faults.append(what)


class Client:
    """One client, which does one thing after the other."""

    def __init__(self, http: httpx.AsyncClient, tally: Tally, seed: int) -> None:
        self.http, self.tally, self.rng = http, tally, random.Random(seed)

    def body(self, **more: object) -> dict[str, object]:
        tokens = self.rng.choice((4, 16, 48))
        return {"prompt": self.rng.choice(PROMPTS), "max_tokens": tokens, "temperature": 0} | more

    async def read_a_stream(self) -> None:
        """Read a stream to its end; the same prompt always has the same answer."""
        body, text, begun = (
            self.body(stream=True, stream_options={"include_usage": True}),
            "",
            time.monotonic(),
        )
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            events = [line[6:] async for line in response.aiter_lines() if line]
        self.tally.expect(
            response.status_code == 200 and events[-1:] == ["[DONE]"],
            f"a stream ended with {events}",
        )
        for event in map(json.loads, events[:-1]):
            text += "".join(choice["text"] for choice in event["choices"])
            self.tally.tokens += (event["usage"] or {}).get("completion_tokens", 0)
        self.tally.worst_ttft_s = max(self.tally.worst_ttft_s, time.monotonic() - begun)
        known = self.tally.texts.setdefault(
            (str(body["prompt"]), int(str(body["max_tokens"]))), text
        )
        self.tally.expect(
            known == text, f"{body['prompt']!r} was answered by {known!r} and by {text!r}"
        )

    async def leave_a_stream(self) -> None:
        """Close a stream after some events."""
        left = self.rng.randrange(4)
        async with self.http.stream(
            "POST", "/v1/completions", json=self.body(stream=True, max_tokens=400)
        ) as response:
            async for _ in response.aiter_lines():
                left -= 1
                if left < 0:
                    return

    async def leave_before_the_answer(self) -> None:
        """Close the connection of a request that is not streamed."""
        try:
            await self.http.post(
                "/v1/completions",
                json=self.body(max_tokens=400),
                timeout=self.rng.uniform(0.01, 0.2),
            )
        except httpx.TimeoutException:
            return

    async def leave_in_the_body(self) -> None:
        """Send less of the body than its length promises."""
        _, writer = await asyncio.open_connection(self.http.base_url.host, self.http.base_url.port)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n{self.key}\r\n"
        writer.write(head.encode() + b'{"prompt"')
        await writer.drain()
        writer.close()

    async def send_nonsense(self) -> None:
        raw = self.rng.choice(
            (
                b"",
                b"{",
                b"[1]",
                b"\xff",
                b'{"prompt": NaN}',
                b'{"prompt": "a", "prompt_": 1}',
                b"null",
            )
        )
        await self.expect_error(400, content=raw)

    async def send_too_much(self) -> None:
        await self.expect_error(413, content=b"x" * (9 << 20))

    async def use_a_wrong_key(self) -> None:
        await self.expect_error(401, json=self.body(), headers={"Authorization": "Bearer nonsense"})

    async def ask_too_much(self) -> None:
        await self.expect_error(400, json=self.body(max_tokens=10**9))

    async def expect_error(self, status: int, **request: object) -> None:
        response = await self.http.post("/v1/completions", **request)  # type: ignore[arg-type]
        shape = set(response.json().get("error", {}))
        self.tally.expect(
            response.status_code == status, f"{response.status_code} in place of {status}"
        )
        self.tally.expect(
            shape == {"message", "type", "param", "code"},
            f"an error of another shape: {response.text}",
        )

    @property
    def key(self) -> str:
        return f"Authorization: {self.http.headers['Authorization']}\r\n"

    async def run(self, until_s: float) -> None:
        deeds: list[tuple[Callable[[], Awaitable[None]], int]] = [
            (self.read_a_stream, 8),
            (self.leave_a_stream, 4),
            (self.leave_before_the_answer, 2),
            (self.leave_in_the_body, 1),
            (self.send_nonsense, 2),
            (self.send_too_much, 1),
            (self.use_a_wrong_key, 1),
            (self.ask_too_much, 1),
        ]
        while time.monotonic() < until_s:
            (deed,) = self.rng.choices([deed for deed, _ in deeds], [weight for _, weight in deeds])
            await deed()
            self.tally.seen[deed.__name__] += 1


async def load(url: str, key: str, seconds: float, clients: int, seed: int = 0) -> Tally:
    tally, until_s = Tally(), time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120, limits=limits) as http:
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(Client(http, tally, seed * clients + number).run(until_s))
        await check_all_is_given_back(http, tally)
    return tally


async def check_all_is_given_back(
    http: httpx.AsyncClient, tally: Tally, seconds: float = 10
) -> None:
    until = time.monotonic() + seconds
    while True:
        text = (await http.get("/metrics")).text
        used = {
            name: float(re.search(rf"^tokenspeed_{name} (.*)$", text, re.M)[1]) for name in IN_USE
        }  # type: ignore[index]
        if not any(used.values()) or time.monotonic() > until:
            break
        await asyncio.sleep(0.05)
    tally.expect(not any(used.values()), f"not given back: {used}")
    tally.expect('status="5' not in text, f"a 5xx: {re.findall('.*status=.5.*', text)}")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--key", default="")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=64)
    args = parser.parse_args()
    tally = asyncio.run(load(args.url, args.key, args.seconds, args.clients))
    print(json.dumps(dict(sorted(tally.seen.items())), indent=1))
    print(f"{tally.tokens} tokens of whole streams, the longest took {tally.worst_ttft_s:.1f} s")
    print(f"{len(tally.faults)} faults", *tally.faults[:20], sep="\n")
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
