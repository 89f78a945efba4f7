"""A simulated load beside the real one, on this machine.

    python benchmarks/simulation.py plans/frozen/demo-cpu --requests 2000 --users 32

Answers random rows of many lengths with the real engine (random weights), then simulates the same
rows, once with the plan's predicted times and once with the mean times that the real steps took.
The steps must be the same, one by one; the times show what the model of steps is worth. Writes
JSON; the exit code is 1 where a step differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

# Read when PyTorch is loaded: OpenMP's idle threads sleep, as in all commands.
os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}

from tokenspeed_plan.planner.advisor.plan_prices import plan_steps
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.bench import prepare
from tokenspeed_plan.runtime.bench.batch_rows import TimedLaunch
from tokenspeed_plan.runtime.engine import Engine
from tokenspeed_plan.runtime.execution.launch import EagerLaunch
from tokenspeed_plan.runtime.simulation.load import Turns, Users
from tokenspeed_plan.runtime.simulation.load_report import Levels, figures
from tokenspeed_plan.runtime.simulation.load_run import simulate

Replay = tuple[str, int, int, float]  # phase, bucket, tokens, microseconds


class MeasuredTimes:
    """The mean times of real steps of the same program and nearly the same size."""

    def __init__(self, replays: list[Replay], host_us: float) -> None:
        self._host_us = host_us
        found: dict[tuple[str, int], list[float]] = defaultdict(list)
        for phase, _, size, us in replays:
            found[phase, _class_of(size)].append(us)
        self._mean = {key: statistics.fmean(times) for key, times in found.items()}

    def prefill_us(self, tokens: int, seqs: int, context: float) -> float:
        """A prefill step."""
        return self._mean["prefill", _class_of(tokens)]

    def decode_us(self, bucket: int, seqs: int, context: float) -> float:
        """A decode step."""
        return self._mean["decode", _class_of(seqs)]

    def host_us(self, seqs: int, prompts: int) -> float:
        """The host, as measured."""
        return self._host_us


def _class_of(size: int) -> int:
    """Sizes that differ by a tenth are of one class."""
    return size if size < 16 else 10 * size.bit_length() + (size << 3 >> size.bit_length())


def rows(plan: Plan, options: argparse.Namespace) -> Users:
    """Rows of random lengths that the plan holds, so many at once."""
    rng = random.Random(options.seed)
    most = plan.pool.limits.max_seq_len
    talks = []
    for _ in range(options.requests):
        prompt = min(int(rng.lognormvariate(4.5, 0.8)) + 1, most - 65)
        talks.append(Turns(prompt, 0, (rng.randrange(1, 65),)))
    return Users(talks, options.users, vocab_size=plan.model.vocab_size, seed=options.seed)


def run_engine(engine: Engine, load: Users) -> float:
    """Seconds of the real engine, whose requests come as soon as they are known."""
    begun = time.perf_counter()
    while load.next_time_s() is not None or engine.num_unfinished or engine.has_step_in_flight:
        while load.next_time_s() is not None:
            engine.add(load.pop().request)
        for completion in engine.step():
            load.answered(completion, 0.0)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    plan = load_plan(options.bundle)
    launch = TimedLaunch(EagerLaunch(), plan.target.device)
    engine = Engine(plan, prepare(plan, options.bundle, None, launch))
    wall_s = run_engine(engine, rows(plan, options))
    found: dict[str, Any] = {"measured_s": round(wall_s, 2)}
    replays = [
        (one.program.phase, one.program.bucket, one.num_tokens, (one.end - one.begin) * 1e6)
        for one in launch.steps
    ]
    host_us = engine.metrics.host_us_per_step
    times = {
        "predicted": plan_steps(plan, options.bundle),
        "measured_steps": MeasuredTimes(replays, host_us),
    }
    real = [replay[:2] for replay in replays]
    same = True
    for name, prices in times.items():
        begun = time.perf_counter()
        run = simulate(plan, prices, rows(plan, options))
        took_s = time.perf_counter() - begun
        same &= [(step.phase, step.bucket) for step in run.steps] == real
        found[name] = figures(run, Levels()) | {"simulated_in_s": round(took_s, 2)}
        del found[name]["definitions"]
        found[f"{name}_off_by"] = round(found[name]["total_s"] / wall_s - 1, 4)
    found["steps_are_the_same"] = same
    print(json.dumps(found, indent=2))
    sys.exit(not same)


if __name__ == "__main__":
    main()
