"""Two pools on two GPUs: hand-overs of long prompts, and what users of the decode pool notice.

    python benchmarks/pools.py BUNDLE [--prompt 50000] [--users 8] [--transport shm]

Weights are random. The prefill pool is a process of its own, on the second GPU that is shown. First
one prompt is handed over while it is computed, then again when it is known (all of it at once: the
rate of the link), and conversations are held, of which is told what the other pool computes in
each turn. Then users read answers: alone; while prompts come every 2 s that the other pool
computes; and while this one computes them itself, in chunks. On a CPU the pools have a core each.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tokenspeed_plan.planner.commands.engines import freeze_gc
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime import Engine, Request, SamplingParams
from tokenspeed_plan.runtime.bench.prepare import prepare
from tokenspeed_plan.runtime.loading.engine_loader import default_launch, pool_of
from tokenspeed_plan.runtime.pools.handovers import Handovers, PeerOptions, make_handovers
from tokenspeed_plan.runtime.pools.pool_rank import make_transport
from tokenspeed_plan.runtime.pools.prefill_server import make_prefill_server

EVERY_S = 2.0  # between two prompts
PHASE_S = 10.0
ANSWER, NEW = 300, 800  # tokens of a turn in a conversation
LONGEST = 24  # gaps that are shown
TOKEN = "benchmark"  # both processes are ours


def engine_of(plan: Plan, bundle: Path, role: str) -> Engine:
    """An engine of one pool with random weights, the same in both."""
    pool = pool_of(plan, role)  # type: ignore[arg-type]
    view = plan.view(pool)
    engine = Engine(view, prepare(view, bundle, None, launch=default_launch(view)))
    freeze_gc()
    return engine


def serve(bundle: Path, transport: str, number: int) -> None:
    """As the other process: be the prefill pool."""
    plan = load_plan(bundle)
    engine = engine_of(plan, bundle, "prefill")
    engine.generate([[5] * 300], SamplingParams(max_tokens=1))
    memory = make_transport(transport, engine.executor.memory)
    make_prefill_server(engine, plan, memory, TOKEN).serve(socket.socket(fileno=number))


def start(bundle: Path, transport: str, listener: socket.socket) -> subprocess.Popen[bytes]:
    """Start the prefill pool on the GPU after this one's."""
    number = listener.fileno()
    words = [__file__, str(bundle), "--transport", transport, "--serve", str(number)]
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    own = {"CUDA_VISIBLE_DEVICES": ",".join(shown[1:] + shown[:1])} if len(shown) > 1 else {}
    return subprocess.Popen([sys.executable, *words], env=os.environ | own, pass_fds=[number])


class Users:
    """Users who read answers, and prompts that come beside them."""

    def __init__(self, engine: Engine, users: int, prompt_tokens: int, output: int) -> None:
        self.engine, self.users, self.output = engine, users, output
        self.prompt_tokens = prompt_tokens
        self._random = torch.Generator().manual_seed(0)
        self._number = 0

    def prompt(self, count: int) -> tuple[int, ...]:
        """Random tokens."""
        ids = torch.randint(5, self.engine.vocab_size, (count,), generator=self._random)
        return tuple(ids.tolist())

    def add(self, name: str, prompt: tuple[int, ...], max_tokens: int) -> None:
        """Ask for an answer of so many tokens."""
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self.engine.add(Request(name, prompt, params))

    def hand_over(self, handovers: Handovers, prompt: tuple[int, ...]) -> dict[str, Any]:
        """The first token of one prompt, alone."""
        before = (handovers.counts.exposed_s, handovers.counts.size_bytes)
        begun = time.perf_counter()
        self.add("alone", prompt, 1)
        while self.engine.num_unfinished:
            self.engine.step()
        exposed_s = handovers.counts.exposed_s - before[0]
        size_bytes = handovers.counts.size_bytes - before[1]
        return {
            "ttft_ms": (time.perf_counter() - begun) * 1e3,
            "exposed_ms": exposed_s * 1e3,
            "size_mb": size_bytes / 1e6,
            "gb_per_s_if_all_exposed": size_bytes / max(exposed_s, 1e-9) / 1e9,
        }

    def read(self, seconds: float, prompts_come: bool) -> dict[str, Any]:
        """Milliseconds between two tokens of each user, and to the first of each prompt."""
        for user in range(self.users):
            self.add(f"user-{user}", self.prompt(200), self.output)
        last: dict[str, float] = {}
        gaps_ms: list[float] = []
        ttfts_ms: list[float] = []

        def note(token: Any) -> None:
            now = time.perf_counter()
            if token.request_id.startswith("user") and token.request_id in last:
                gaps_ms.append((now - last[token.request_id]) * 1e3)
            last[token.request_id] = now

        waiting = [self.prompt(self.prompt_tokens) for _ in range(int(seconds / EVERY_S) + 1)]
        self.engine.on_token = note
        while len(last) < self.users:
            self.engine.step()
        gaps_ms.clear()
        begun = time.perf_counter()
        next_s = begun + 1.0
        if not prompts_come:
            next_s = float("inf")
        while time.perf_counter() - begun < seconds and self.engine.num_unfinished:
            if time.perf_counter() > next_s and waiting:
                next_s += EVERY_S
                self._number += 1
                self.add(f"prompt-{self._number}", waiting.pop(), 2)
            for done in self.engine.step():
                if done.request_id.startswith("prompt"):
                    ttfts_ms.append(done.ttft_s * 1e3)
        self._cancel_all()
        return _figures(gaps_ms, ttfts_ms)

    def converse(self, handovers: Handovers, turns: int, reads: bool) -> dict[str, Any]:
        """One conversation: tokens that the other pool computed in each turn, and its time.

        Args:
            handovers: to that pool.
            turns: of the conversation.
            reads: whether the next turn comes after the answer went back, not at once.
        """
        ids, computed, ttfts_ms, back_ms = self.prompt(self.prompt_tokens), [], [], []
        params, counts = SamplingParams(max_tokens=ANSWER, ignore_eos=True), handovers.counts
        sent_bytes = counts.returned_bytes
        for _ in range(turns):
            before = counts.computed_tokens
            (done,) = self.engine.generate([ids], params)
            computed.append(counts.computed_tokens - before)
            ttfts_ms.append(round(done.ttft_s * 1e3, 1))
            if reads:
                back_ms.append(round(self._wait_idle() * 1e3, 1))
            ids = (*ids, *done.token_ids, *self.prompt(NEW))
        again = sum(computed[1:]) - NEW * (turns - 1)
        sent_mb = round((counts.returned_bytes - sent_bytes) / 1e6, 2)
        figures = {"computed": computed, "computed_again": again, "ttft_ms": ttfts_ms}
        return figures | {"answers_back_ms": back_ms, "answers_mb": sent_mb}

    def _wait_idle(self) -> float:
        """Seconds until an answer is back."""
        begun = time.perf_counter()
        while not self.engine.is_idle:
            self.engine.step()
        return time.perf_counter() - begun

    def _cancel_all(self) -> None:
        self.engine.on_token = None
        for name in list(self.engine.loop.sequences):
            self.engine.cancel(name)
        while self.engine.num_unfinished or self.engine.has_step_in_flight:
            self.engine.step()


def _figures(gaps_ms: list[float], ttfts_ms: list[float]) -> dict[str, Any]:
    parts = statistics.quantiles(gaps_ms, n=100)
    return {
        "tokens": len(gaps_ms),
        "tpot_p50_ms": parts[49],
        "tpot_p99_ms": parts[98],
        "longest_gaps_ms": [round(gap, 2) for gap in sorted(gaps_ms)[: -LONGEST - 1 : -1]],
        "prompts": len(ttfts_ms),
        "ttft_ms": [round(ttft, 1) for ttft in ttfts_ms],
    }


def forget(engine: Engine) -> None:
    """Let the prefix cache forget everything."""
    cache = engine.scheduler.cache
    for node in cache.checkpoints:
        cache.forget_checkpoint(node.state_slot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", type=int, default=50_000)
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--output", type=int, default=1500)
    parser.add_argument("--seconds", type=float, default=PHASE_S)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--transport", default="shm")
    parser.add_argument("--serve", type=int)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.bundle, options.transport, options.serve)
        return
    plan = load_plan(options.bundle)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        child = start(options.bundle, options.transport, listener)
        try:
            measure(plan, options, listener.getsockname()[:2])
        finally:
            child.kill()
            child.wait()


def measure(plan: Plan, options: argparse.Namespace, address: tuple[str, int]) -> None:
    """All phases, each printed as it is done."""
    engine = engine_of(plan, options.bundle, "decode")
    users = Users(engine, options.users, options.prompt, options.output)
    engine.generate([[5] * 300], SamplingParams(max_tokens=4))
    show("predicted", plan.predicted.model_dump(mode="json", include={"values"}))
    show("idle", users.read(options.seconds / 2, prompts_come=False))
    transport = make_transport(options.transport, engine.executor.memory)
    handovers = make_handovers(engine, plan, transport, PeerOptions((address,), TOKEN))
    handovers.start()
    engine.loop.elsewhere = handovers
    users.hand_over(handovers, users.prompt(options.prompt // 2))  # warm
    prompt = users.prompt(options.prompt)
    show("first hand-over", users.hand_over(handovers, prompt))
    for _ in range(3):
        forget(engine)
        show("all at once", users.hand_over(handovers, prompt))
    show("conversation", users.converse(handovers, options.turns, reads=False))
    show("conversation of a reader", users.converse(handovers, options.turns, reads=True))
    show("two pools", users.read(options.seconds, prompts_come=True))
    show("counts", {name: getattr(handovers.counts, name) for name in handovers.counts.__slots__})
    engine.loop.close()
    show("one pool, chunks", users.read(options.seconds, prompts_come=True))


def show(name: str, figures: dict[str, Any]) -> None:
    """Print one line of JSON."""
    print(json.dumps({name: figures}, allow_nan=False), flush=True)


if __name__ == "__main__":
    main()
