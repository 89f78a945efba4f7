"""The tokens a second of a server and its streams, compared with those of its engine alone.

    python benchmarks/server.py DIR [--streams 64] [--rounds 2] [--prompt 256] [--tokens 256]
    python benchmarks/server.py --step-us 15000

DIR is a bundle; weights are random. Without one, steps of the demo model on an H200 take
`--step-us` and compute nothing, so that the server is measured and no model. The vocabulary is made
up: each token is a word. The engine answers `--rounds` times `--streams` completions by itself, of
which `--streams` are in flight, then through the server in the same process: each stream sends one
after the other, and reads every event. Clients are in another process. Figures are the medians of
`--turns` runs after one that warms up; microseconds of a token are processor time of all threads
of the server's process, its kernel's part and the requests included, over all runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SCRIPT = str(Path(__file__).resolve())
END = b"data: [DONE]\n\n"
SIZES = {"streams": 64, "rounds": 2, "prompt": 256, "tokens": 256, "turns": 3}


def made_up_tokenizer(size: int) -> Any:
    """Bytes, then words; nothing is merged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from tokenspeed_plan.runtime.tokenizer import Tokenizer as Ours

    rng, alphabet = random.Random(0), sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = dict.fromkeys(alphabet)
    while len(texts) < size:
        texts["Ġ" + "".join(rng.choices("etaoinshrdlucm", k=rng.randint(2, 8)))] = None
    inner = Tokenizer(models.BPE({text: number for number, text in enumerate(texts)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return Ours(inner)


def prompts_of(options: argparse.Namespace, vocab_size: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    count = options.streams * options.rounds
    return [[rng.randrange(vocab_size) for _ in range(options.prompt)] for _ in range(count)]


def engine_of(options: argparse.Namespace) -> Any:
    """The engine of a bundle, or one whose steps take a stated time."""
    from host import Paced, demo_plan

    from tokenspeed_plan.plans.bundle import load_plan
    from tokenspeed_plan.runtime import Engine, bench
    from tokenspeed_plan.runtime.loading.engine_loader import default_launch

    if options.bundle is None:
        plan = demo_plan(options.streams, options.prompt, options.tokens)
        executor: Any = Paced(plan, options.step_us)
    else:
        plan = load_plan(options.bundle)
        executor = bench.prepare(plan, options.bundle, None, default_launch(plan))
    return Engine(plan, executor, made_up_tokenizer(plan.model.vocab_size))


def own_s(engine: Any, options: argparse.Namespace, seed: int) -> tuple[float, float]:
    """Seconds of the engine alone and of its processors, with a request in flight for a stream."""
    from tokenspeed_plan.runtime import Request, SamplingParams

    params = SamplingParams(max_tokens=options.tokens, ignore_eos=True)
    waiting = [
        Request(f"own-{number}", tuple(prompt), params)
        for number, prompt in enumerate(prompts_of(options, engine.vocab_size, seed))
    ]
    begun, begun_cpu = time.perf_counter(), time.process_time()
    for _ in range(options.streams):
        engine.add(waiting.pop())
    while engine.num_unfinished:
        for _ in engine.step()[: len(waiting)]:
            engine.add(waiting.pop())
    return time.perf_counter() - begun, time.process_time() - begun_cpu


def measure(engine: Any, options: argparse.Namespace) -> dict[str, float]:
    """Tokens a second of the engine and of the server, their costs, and the tokens of an event."""
    from tokenspeed_plan.runtime.serving.http import ServerOptions, listen, serve

    tokens = options.streams * options.rounds * options.tokens
    own = [own_s(engine, options, seed) for seed in range(options.turns + 1)]
    words = [f"--{name}={getattr(options, name)}" for name in SIZES]
    with listen("127.0.0.1", 0) as listener:
        words += [f"--port={listener.getsockname()[1]}", f"--vocab={engine.vocab_size}"]
        command = [sys.executable, SCRIPT, *words]
        begun: list[tuple[subprocess.Popen[bytes], float]] = []

        def ready() -> None:
            clients = subprocess.Popen(command, stdout=subprocess.PIPE)
            begun.append((clients, time.process_time()))

        # It ends with the signal of the clients.
        serve(engine, ServerOptions(max_requests=2 * options.streams), listener, ready)
    ((clients, begun_s),) = begun
    served_cpu_s = time.process_time() - begun_s
    said, _ = clients.communicate()
    found = json.loads(said)
    num_all = tokens * (options.turns + 1)
    return {
        "engine": tokens / statistics.median(seconds for seconds, _ in own[1:]),
        "server": tokens / statistics.median(found["taken_s"]),
        "an_event": tokens * options.turns / found["events"],
        "engine_us": 1e6 * sum(cpu_s for _, cpu_s in own) / num_all,
        "server_us": 1e6 * served_cpu_s / num_all,
    }


class Reader(asyncio.Protocol):
    """Sends a request, and counts the events of its answer."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._end = b""
        self.num_events = 0
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.num_events += data.count(b"data: ")
        self._end = (self._end + data)[-64:]

    def connection_lost(self, exc: Exception | None) -> None:
        if END in self._end:
            self.done.set_result(self.num_events)
        else:
            self.done.set_exception(AssertionError(f"a stream has no end: {self._end!r}"))


async def completion(port: int, prompt: list[int], tokens: int) -> int:
    """Stream a completion; returns the number of its events."""
    body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    data = json.dumps(body | {"temperature": 0}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    request = head.encode() + data
    _, reader = await loop.create_connection(lambda: Reader(request), "127.0.0.1", port)
    found: int = await reader.done
    return found


async def stream_all(options: argparse.Namespace, seed: int) -> tuple[float, int]:
    """Seconds until all completions are read, and how many events they had."""
    prompts = prompts_of(options, options.vocab, seed)

    async def one(number: int) -> int:
        streams = prompts[number :: options.streams]
        return sum([await completion(options.port, prompt, options.tokens) for prompt in streams])

    begun = time.perf_counter()
    events = await asyncio.gather(*(one(number) for number in range(options.streams)))
    return time.perf_counter() - begun, sum(events)


def be_clients(options: argparse.Namespace) -> None:
    """Read all streams, say how long it took, and end the server."""
    try:
        seeds = range(100, 101 + options.turns)  # prompts that the cache has not seen
        _, *found = [asyncio.run(stream_all(options, seed)) for seed in seeds]
        taken_s, events = [seconds for seconds, _ in found], sum(count for _, count in found)
        print(json.dumps({"taken_s": taken_s, "events": events}), flush=True)
    finally:
        os.kill(os.getppid(), signal.SIGTERM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--step-us", type=float, default=15_000.0)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--vocab", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.port is not None:
        be_clients(options)
        return
    from tokenspeed_plan.planner.commands.engines import freeze_gc

    engine = engine_of(options)
    freeze_gc()
    found = measure(engine, options)
    print(
        f"{engine.plan.model.name}, {options.streams} streams: engine {found['engine']:.0f} "
        f"tokens/s, server {found['server']:.0f} = {found['server'] / found['engine']:.1%}; "
        f"{found['an_event']:.1f} tokens an event; a token costs {found['engine_us']:.1f} us of a "
        f"processor in the engine alone, {found['server_us']:.1f} us in the server",
        flush=True,
    )


if __name__ == "__main__":
    main()
