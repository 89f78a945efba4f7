"""The tokens a second of a server and its streams, compared with those of its engine alone.

    python benchmarks/server.py DIR [--streams 64] [--rounds 2] [--prompt 256] [--tokens 256]

DIR is a bundle; weights are random, and so is the vocabulary, in which each token is a word. The
engine answers `--rounds` times `--streams` completions first by itself, then through the server in
the same process: each stream sends one after the other, and reads every event. Clients are in
another process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SCRIPT = str(Path(__file__).resolve())


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


def serve(options: argparse.Namespace) -> None:
    """Measure the engine, then serve until a signal comes."""
    from tokenspeed_plan.planner.commands.engines import freeze_gc
    from tokenspeed_plan.plans.bundle import load_plan
    from tokenspeed_plan.runtime import Engine, SamplingParams, bench
    from tokenspeed_plan.runtime.loading.engine_loader import default_launch
    from tokenspeed_plan.runtime.serving.http import ServerOptions, listen
    from tokenspeed_plan.runtime.serving.http import serve as serve_http

    plan = load_plan(options.bundle)
    executor = bench.prepare(plan, options.bundle, None, default_launch(plan))
    engine = Engine(plan, executor, made_up_tokenizer(plan.model.vocab_size))
    params = SamplingParams(max_tokens=options.tokens, ignore_eos=True)
    freeze_gc()
    for seed in (1, 2):  # the first warms up
        prompts = prompts_of(options, engine.vocab_size, seed)
        begun = time.perf_counter()
        engine.generate(prompts, params)
        own_s = time.perf_counter() - begun
    found = {"vocab_size": engine.vocab_size, "own_s": own_s, "name": plan.model.name}
    print(json.dumps(found), flush=True)
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        server = ServerOptions(max_requests=2 * options.streams)
        serve_http(engine, server, listener, lambda: print(json.dumps({"port": port}), flush=True))


async def completion(port: int, prompt: list[int], tokens: int) -> int:
    """Stream a completion; returns the number of its events."""
    body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    data = json.dumps(body | {"temperature": 0}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    writer.write(head.encode() + data)
    status = await reader.readline()
    assert b" 200 " in status, status
    events, is_done = 0, False
    while line := await reader.readline():
        events += line.startswith(b"data:")
        is_done |= line.startswith(b"data: [DONE]")
    writer.close()
    assert is_done, "a stream has no end"
    return events


async def stream_all(port: int, options: argparse.Namespace, vocab_size: int, seed: int) -> float:
    """Seconds until all completions are read."""
    prompts = prompts_of(options, vocab_size, seed)

    async def one(number: int) -> None:
        for prompt in prompts[number :: options.streams]:
            await completion(port, prompt, options.tokens)

    begun = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(options.streams)))
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    for name, default in (("streams", 64), ("rounds", 2), ("prompt", 256), ("tokens", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return
    command = [sys.executable, SCRIPT, *sys.argv[1:], "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        own = json.loads(server.stdout.readline())
        port = json.loads(server.stdout.readline())["port"]
        taken_s = [
            asyncio.run(stream_all(port, options, own["vocab_size"], seed)) for seed in (3, 4)
        ]
        server.terminate()
    tokens = options.streams * options.rounds * options.tokens
    rates = {"engine": tokens / own["own_s"], "server": tokens / taken_s[1]}
    shown = ", ".join(f"{name} {rate:.0f} tokens/s" for name, rate in rates.items())
    share = rates["server"] / rates["engine"]
    print(f"{own['name']}, {options.streams} streams: {shown} = {share:.1%}", flush=True)


if __name__ == "__main__":
    main()
