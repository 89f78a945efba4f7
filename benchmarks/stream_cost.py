"""What a streamed token and a request cost the server's loop, without engine, model and sockets.

    python benchmarks/stream_cost.py [--streams 64] [--tokens 40] [--rounds 25] [--apis chats ...]

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
from typing import Any, NamedTuple

from host import NoModel
from server import made_up_tokenizer
from uvicorn import Config
from uvicorn.server import ServerState

from tokenspeed_plan.codegen.chat_template import ChatTemplate
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


class Api(NamedTuple):
    """How an API is asked, and how many events begin and end its answer of one text.

    Attributes:
        num_first: up to the first token's own.
        num_last: from the last token's on, which comes with the completion.
    """

    path: str
    body: dict[str, Any]
    num_first: int = 1
    num_last: int = 2


CHAT = [{"role": "user", "content": "Write a function."}]
APIS = {
    "completions": Api("completions", {"prompt": list(range(300, 364)), "max_tokens": 500}),
    "chats": Api("chat/completions", {"messages": CHAT, "max_tokens": 500}),
    "responses": Api("responses", {"input": CHAT, "max_output_tokens": 500}, 5, 4),
    "messages": Api("messages", {"messages": CHAT, "max_tokens": 500}, 3, 3),
}


def request_of(api: Api) -> bytes:
    body = json.dumps(api.body | {"stream": True, "temperature": 0}).encode()
    head = f"POST /v1/{api.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Bench:
    """Some connections of one app, and made up steps of an engine that is never run."""

    def __init__(self, service: Service, api: Api, options: argparse.Namespace) -> None:
        self.engine, self._limiter = service.engine, service.limiter
        self.engine._loop = asyncio.get_running_loop()
        self.engine._idle = asyncio.Event()
        self._num_tokens = options.tokens
        self._api, self._request = api, request_of(api)
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
        num_first = self._api.num_first
        for number in range(2):  # the first events of an answer are others than the next
            self.give(*(NewToken(name, self._rng.choice(WORDS)) for name in names))
            await self.until(before + (num_first + number) * len(names))
        began_s = time.thread_time()
        for number in range(self._num_tokens):
            self.give(*(NewToken(name, self._rng.choice(WORDS)) for name in names))
            await self.until(before + (num_first + 2 + number) * len(names))
        ended_s = time.thread_time()
        self.give(*(Completion(n, (300,), "", "length", 64, 0.1, 0.1) for n in names))
        num_each = num_first + 1 + self._num_tokens + self._api.num_last
        await self.until(before + num_each * len(names))
        while self._limiter.num_in_flight:
            await asyncio.sleep(0)
        done_s = time.thread_time()
        assert self._num_events() == before + num_each * len(names)
        token_us = 1e6 * (ended_s - began_s) / self._num_tokens / len(names)
        all_us = 1e6 * (done_s - begun_s) / len(names)
        return token_us, all_us - (self._num_tokens + 2) * token_us


async def measure(service: Service, name: str, options: argparse.Namespace) -> None:
    bench = Bench(service, APIS[name], options)
    await bench.round()
    gc.collect()
    gc.freeze()
    found = [await bench.round() for _ in range(options.rounds)]
    for kind, values in zip(("token", "request"), zip(*found, strict=True), strict=True):
        least, middle = min(values), statistics.median(values)
        print(f"{name}, a {kind}: {least:.1f} us at least, {middle:.1f} in the median", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"streams": 64, "tokens": 40, "rounds": 25}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--apis", nargs="+", choices=APIS, default=list(APIS))
    options = parser.parse_args()
    plan = load_plan(BUNDLE)
    model = BUNDLE.parents[2] / "examples/demo/model"
    plain = made_up_tokenizer(plan.model.vocab_size)
    tokenizer = type(plain)(plain._tokenizer, ChatTemplate.load(model))
    for name in options.apis:
        engine = Engine(plan, NoModel(plan), tokenizer)  # type: ignore[arg-type]
        with ThreadPoolExecutor(1) as workers:
            limits = ServerOptions(max_requests=options.streams)
            service = _service(engine, limits, workers, workers)
            asyncio.run(measure(service, name, options))


if __name__ == "__main__":
    main()
