"""Conversations that come again in turn, more than the GPU has room for: with and without a host.

    python benchmarks/host_cache.py BUNDLE [--talks 12] [--held 4] [--first 16000] [--turn 800]

BUNDLE is a plan with a host cache, whose own limits hold all conversations; weights are random.
They take two turns, one after the other: held on the GPU; with the GPU's cache cut down to `--held`
of them and the host behind it; and cut down alone, where a turn that comes back is computed anew.
Every answer of the second must be that of the first, token by token. In the first two one user
reads an answer while others come back: milliseconds between two tokens. Prompts leave checkpoints
at their ends alone, so that the GPU has room for those of all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tokenspeed_plan.planner.commands.engines import freeze_gc
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime import Engine, Request, SamplingParams
from tokenspeed_plan.runtime.bench.agentic import simulate
from tokenspeed_plan.runtime.bench.machine import host_bytes_per_s
from tokenspeed_plan.runtime.bench.prepare import prepare
from tokenspeed_plan.runtime.loading.engine_loader import default_launch

ROUNDS = 2
CHECKPOINTS = 4  # of a conversation on the GPU
TOGETHER_S = 1e-4  # between tokens of one step


@dataclass
class Talks:
    """Conversations of random tokens, the same in each run."""

    options: argparse.Namespace
    vocab_size: int
    texts: list[list[int]] = field(default_factory=list)
    answers: list[tuple[int, ...]] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)  # tokens of each prompt

    def __post_init__(self) -> None:
        self._random = torch.Generator().manual_seed(0)
        self.texts = [self.ids(self.options.first) for _ in range(self.options.talks)]

    def ids(self, count: int) -> list[int]:
        """Random tokens."""
        found: list[int] = torch.randint(
            5, self.vocab_size, (count,), generator=self._random
        ).tolist()
        return found

    def take_turns(self, engine: Engine, count: int) -> dict[str, Any]:
        """One turn of the first conversations, one after the other."""
        params = SamplingParams(max_tokens=self.options.output, ignore_eos=True)
        ttfts_ms, first = [], len(self.computed)
        for text in self.texts[:count]:
            (done,) = engine.generate([text], params)
            ttfts_ms.append(done.ttft_s * 1e3)
            self.computed.append(len(text) - done.num_cached_tokens)
            self.answers.append(done.token_ids)
            text += [*done.token_ids, *self.ids(self.options.turn)]
        return {
            "ttft_ms": round(statistics.median(ttfts_ms), 2),
            "least": round(min(ttfts_ms), 2),
            "most": round(max(ttfts_ms), 2),
            "computed_tokens": round(statistics.mean(self.computed[first:]), 1),
        }


def whole(plan: Plan) -> Plan:
    """The plan without checkpoints inside of prompts."""
    limits = plan.pool.limits
    interval = -(-limits.max_seq_len // limits.page_size) * limits.page_size
    return plan.with_pool(limits=limits.model_copy(update={"checkpoint_interval": interval}))


def cut(plan: Plan, options: argparse.Namespace, host: bool) -> Plan:
    """The plan with a cache for fewer conversations; its memory stays as large as it was."""
    limits = plan.pool.limits
    longest = options.first + ROUNDS * (options.turn + options.output)
    checkpoints = min(CHECKPOINTS * options.held, limits.num_checkpoints)
    changes = {
        "num_pages": options.held * (-(-longest // limits.page_size) + 1),
        "num_checkpoints": checkpoints,
        "num_state_slots": 2 + limits.max_seqs * limits.state_slots_per_seq + checkpoints,
    }
    host_cache = plan.pool.host_cache if host else None
    return plan.with_pool(limits=limits.model_copy(update=changes), host_cache=host_cache)


def run(engine: Engine, plan: Plan, options: argparse.Namespace, count: int) -> Talks:
    """All rounds on one plan; the engine forgets what it had before."""
    engine.plan = plan
    engine._reset()
    talks = Talks(options, engine.vocab_size - 1000)
    for number in range(ROUNDS):
        figures = talks.take_turns(engine, count)
        counts = engine.metrics
        figures |= {
            "host_hits": counts.host_hits,
            "stored_mb": round(counts.host_stored_bytes / 1e6),
            "loaded_mb": round(counts.host_loaded_bytes / 1e6),
            "evicted": [counts.evicted_checkpoints, counts.host_evicted_checkpoints],
        }
        show(f"round {number + 1}", figures)
    return talks


def read_beside(engine: Engine, talks: Talks, others: int) -> list[float]:
    """Milliseconds between the tokens of one user, while other conversations come back."""
    gaps_ms: list[float] = []
    last_s = 0.0

    def note(token: Any) -> None:
        nonlocal last_s
        now = time.perf_counter()
        if token.request_id == "reader":
            if now - last_s > TOGETHER_S:
                gaps_ms.append((now - last_s) * 1e3)
            last_s = now

    engine.on_token = note
    reader = SamplingParams(max_tokens=400, ignore_eos=True)
    engine.add(Request("reader", tuple(talks.ids(200)), reader))
    waiting = list(enumerate(talks.texts[:others]))
    for step in range(10_000):
        if not engine.num_unfinished:
            break
        if waiting and step % 40 == 39:
            number, text = waiting.pop()
            engine.add(Request(str(number), tuple(text), SamplingParams(max_tokens=2)))
        engine.step()
    engine.on_token = None
    return sorted(gaps_ms[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--talks", type=int, default=12)
    parser.add_argument("--held", type=int, default=4)
    parser.add_argument("--first", type=int, default=16_000)
    parser.add_argument("--turn", type=int, default=800)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--acceptance", type=float, default=0.89)
    options = parser.parse_args()
    plan = load_plan(options.bundle)
    assert plan.pool.host_cache is not None, "plan with `serving: {host_cache_gib: N}`"
    begun = time.perf_counter()
    engine = Engine(plan, prepare(plan, options.bundle, None, launch=default_launch(plan)))
    freeze_gc()
    show("prepared_s", round(time.perf_counter() - begun, 1))
    show("host_cache", plan.pool.host_cache.model_dump())
    show("link_gb_per_s", round(host_bytes_per_s(plan.target.device) / 1e9, 1))
    if plan.pool.limits.max_depth:
        simulate(engine, [options.acceptance] * plan.pool.limits.max_depth)
    engine.generate([[5] * 300], SamplingParams(max_tokens=4))
    measure(engine, whole(plan), options)


def measure(engine: Engine, plan: Plan, options: argparse.Namespace) -> None:
    """All three runs, and the reader."""
    print("all on the GPU", flush=True)
    wanted = run(engine, plan, options, options.talks)
    read(engine, wanted, options)
    print(f"{options.held} on the GPU, all on the host", flush=True)
    found = run(engine, cut(plan, options, host=True), options, options.talks)
    alike = [mine == other for mine, other in zip(found.computed, wanted.computed, strict=True)]
    same = [mine == other for mine, other in zip(found.answers, wanted.answers, strict=True)]
    show("answers", {"all": len(same), "begun_alike": sum(alike), "same": sum(same)})
    read(engine, found, options)
    print(f"{options.held} on the GPU alone", flush=True)
    run(engine, cut(plan, options, host=False), options, options.held + 1)


def read(engine: Engine, talks: Talks, options: argparse.Namespace) -> None:
    """Show what a reader notices of nobody, and of others that come back."""
    for others in (0, options.held):
        gaps_ms = read_beside(engine, talks, others)
        middle, late = (round(gaps_ms[len(gaps_ms) * share // 100], 2) for share in (50, 99))
        most = round(gaps_ms[-1], 2)
        show(f"reader beside {others}", {"p50_ms": middle, "p99_ms": late, "most_ms": most})


def show(name: str, figures: Any) -> None:
    """Print one line of JSON."""
    print(json.dumps({name: figures}, allow_nan=False), flush=True)


if __name__ == "__main__":
    main()
