"""What a streamed token and a request cost the server's loop, without engine, model and sockets.

    python benchmarks/stream_cost.py [--streams 64] [--tokens 40] [--rounds 25] [--chat]

Connections get requests as bytes, and what they write is counted and thrown away; all between is
the server: HTTP, the app and its middleware, parsing, streams, text, events. Tokens are made up,
and handed to the loop as the engine's thread does it, a token of each stream at once. Microseconds
are processor time of the loop's thread: the least and the median of the rounds. With another
checkout first on PYTHONPATH it measures that one.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from host import NoModel
from server import made_up_tokenizer
from uvicorn import Config
from uvicorn.server import ServerState

from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.runtime import Engine
from tokenspeed_plan.runtime.request import Completion, NewToken
from tokenspeed_plan.runtime.serving.http.app import Service, make_app
from tokenspeed_plan.runtime.serving.http.connections import Connection
from tokenspeed_plan.runtime.serving.http.server import ServerOptions, _service

BUNDLE = Path(__file__).parent.parent / "plans/frozen/demo-cpu"
TIMEOUT_S = 20
WORDS = range(300, 2000)  # tokens of the vocabulary that are whole words


class Counter(asyncio.Transport):
    """Where a connection writes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_events = 0

    def write(self, data: Any) -> None:
        self.num_events += bytes(data).count(b"data: ")

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def close(self) -> None:
        pass


def request_of(chat: bool) -> bytes:
    prompt: dict[str, Any] = {"prompt": list(range(300, 364))}
    if chat:
        prompt = {"messages": [{"role": "user", "content": "Write a function."}]}
    body = json.dumps(prompt | {"stream": True, "max_tokens": 500, "temperature": 0}).encode()
    path = "/v1/chat/completions" if chat else "/v1/completions"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Bench:
    """Some connections of one app, and made up steps of an engine that is never run."""

    def __init__(self, service: Service, options: argparse.Namespace) -> None:
        self.engine, self._limiter = service.engine, service.limiter
        self.engine._loop = asyncio.get_running_loop()
        self.engine._idle = asyncio.Event()
        self._num_tokens = options.tokens
        self._request = request_of(options.chat)
        self._rng = random.Random(0)
        config = Config(make_app(service), http=Connection, log_level="error", ws="none")
        config.load()
        self._counters = [Counter() for _ in range(options.streams)]
        self._connections = [Connection(config, ServerState(), {}) for _ in self._counters]
        for connection, counter in zip(self._connections, self._counters, strict=True):
            connection.connection_made(counter)

    async def until(self, num_events: int) -> None:
        """Run the loop until as many events were written."""
        async with asyncio.timeout(TIMEOUT_S):
            while self._num_events() < num_events:
                await asyncio.sleep(0)

    def _num_events(self) -> int:
        return sum(counter.num_events for counter in self._counters)

    def give(self, *items: NewToken | Completion) -> None:
        self.engine._steps = [(items, time.perf_counter())]
        self.engine._deliver()

    async def round(self) -> tuple[float, float]:
        """Microseconds of a token, and of a request beside its tokens."""
        before = self._num_events()
        begun_s = time.thread_time()
        for connection in self._connections:
            connection.data_received(self._request)
        async with asyncio.timeout(TIMEOUT_S):  # a request that is refused makes no stream
            while len(self.engine._streams) < len(self._connections):
                await asyncio.sleep(0)
        names = list(self.engine._streams)
        for number in range(1, 3):  # the first events of an answer are others than the next
            self.give(*(NewToken(name, self._rng.choice(WORDS)) for name in names))
            await self.until(before + number * len(names))
        began_s = time.thread_time()
        for number in range(3, self._num_tokens + 3):
            self.give(*(NewToken(name, self._rng.choice(WORDS)) for name in names))
            await self.until(before + number * len(names))
        ended_s = time.thread_time()
        self.give(*(Completion(n, (300,), "", "length", 64, 0.1, 0.1) for n in names))
        num_events = before + (self._num_tokens + 4) * len(names)  # with the last ones, and [DONE]
        await self.until(num_events)
        while self._limiter.num_in_flight:
            await asyncio.sleep(0)
        done_s = time.thread_time()
        assert self._num_events() == num_events
        token_us = 1e6 * (ended_s - began_s) / self._num_tokens / len(names)
        all_us = 1e6 * (done_s - begun_s) / len(names)
        return token_us, all_us - (self._num_tokens + 2) * token_us


async def measure(service: Service, options: argparse.Namespace) -> None:
    bench = Bench(service, options)
    await bench.round()
    gc.collect()
    gc.freeze()
    found = [await bench.round() for _ in range(options.rounds)]
    for name, values in zip(("token", "request"), zip(*found, strict=True), strict=True):
        least, middle = min(values), statistics.median(values)
        print(f"a {name}: {least:.1f} us at least, {middle:.1f} us in the median", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"streams": 64, "tokens": 40, "rounds": 25}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chat", action="store_true", help="chats in the place of completions")
    options = parser.parse_args()
    plan = load_plan(BUNDLE)
    tokenizer = made_up_tokenizer(plan.model.vocab_size)
    if options.chat:
        from tokenspeed_plan.codegen.chat_template import ChatTemplate

        model = BUNDLE.parents[2] / "examples/demo/model"
        tokenizer = type(tokenizer)(tokenizer._tokenizer, ChatTemplate.load(model))
    engine = Engine(plan, NoModel(plan), tokenizer)  # type: ignore[arg-type]
    with ThreadPoolExecutor(1) as workers:
        service = _service(engine, ServerOptions(max_requests=options.streams), workers, workers)
        asyncio.run(measure(service, options))


if __name__ == "__main__":
    main()
