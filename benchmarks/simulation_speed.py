"""What a simulated request costs the CPU, in microseconds, for a few loads.

    python benchmarks/simulation_speed.py --requests 4000 --loads h200-128 h200-512

No plan is made: the simulation gets the outline that the planner judges deployments by. A round
before the others prices the steps and does not count. Writes JSON: time of the core that the
fastest round took, of a request and of 100,000; and a digest of all steps and answers, which tells
whether two versions of the simulator find the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from dataclasses import dataclass

from tokenspeed_plan.planner.advisor.candidate import Candidate, Knobs
from tokenspeed_plan.planner.advisor.load_judge import Deployment
from tokenspeed_plan.planner.advisor.prediction import Predictor
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.machines.hardware import find_hardware
from tokenspeed_plan.planner.models.config import load_preset
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.runtime.simulation.load import Turns, Users
from tokenspeed_plan.runtime.simulation.load_results import Simulated
from tokenspeed_plan.runtime.simulation.load_run import simulate


@dataclass(frozen=True)
class Case:
    """A load on a machine: users in a closed loop, or turns that arrive in a second.

    `outputs` are the least and the most tokens of an answer, in between any number.
    """

    gpu: str
    preset: str
    seqs: int
    outputs: tuple[int, int]
    page_size: int
    turns_per_s: float | None = None
    turns: int = 1


_H200 = ("H200", "qwen3.5-35b-a3b")
CASES = {
    "h200-128": Case(*_H200, 128, (256, 256), 64),
    "h200-128-spread": Case(*_H200, 128, (64, 448), 64),
    "h200-512": Case(*_H200, 512, (256, 256), 64),
    "h200-poisson": Case(*_H200, 128, (64, 448), 64, turns_per_s=16.0),
    "h200-16-agentic": Case(*_H200, 16, (64, 448), 64, turns=8),
    "cpu-16": Case("cpu", "qwen3.5-0.8b", 16, (256, 256), 16),
}


def deployment(case: Case) -> Deployment:
    """What a planner would judge."""
    workload = {
        "kind": "batch" if case.turns == 1 else "agentic",
        "first_turn_tokens": 1024,
        "output_tokens": case.outputs[1],
        "concurrency": case.seqs,
    }
    if case.turns > 1:
        workload |= {"turns": case.turns, "turn_tokens": 200}
    spec = Spec.model_validate(
        {
            "version": 1,
            "model": {"preset": case.preset},
            "target": {"gpu": case.gpu, "count": 1},
            "workload": workload,
            "speculation": "off",
        }
    )
    predictor = Predictor(spec, load_preset(case.preset)[0], find_hardware(case.gpu))
    candidate = Candidate(ParallelLayout(1, 1, 1), Knobs(8192, case.page_size, 0))
    return Deployment(predictor, candidate, {})


def load(one: Deployment, case: Case, requests: int) -> Users:
    """So many requests."""
    dice = random.Random(1)
    talks = [
        Turns(1024, 200, tuple(dice.randint(*case.outputs) for _ in range(case.turns)))
        for _ in range(requests // case.turns)
    ]
    users = None if case.turns_per_s else case.seqs
    return Users(talks, users, case.turns_per_s or 0.0, 0.0, one.outline.model.vocab_size)


def digest(found: Simulated) -> str:
    """Of all that was found."""
    parts = (
        [(each.phase, each.bucket, each.seqs, each.tokens, each.end_s) for each in found.steps],
        [(each.arrival_s, each.queue_s, each.ttft_s, each.decode_s) for each in found.answers],
        [(each.cached_tokens, each.output_tokens) for each in found.answers],
        (found.metrics.evicted_checkpoints, found.metrics.evicted_pages, found.metrics.preemptions),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def measure(case: Case, requests: int, rounds: int) -> dict[str, object]:
    """Microseconds of a core for each request: of the fastest round, as others share the caches."""
    one, times_us = deployment(case), []
    for _ in range(rounds + 1):
        asked = load(one, case, requests)
        begun = time.process_time()
        found = simulate(one.outline, one.times, asked)
        times_us.append((time.process_time() - begun) / len(found.answers) * 1e6)
    request_us = min(times_us[1:])
    return {
        "us_per_request": round(request_us, 1),
        "s_per_100_000": round(request_us * 0.1, 1),
        "requests": len(found.answers),
        "steps": len(found.steps),
        "found": digest(found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loads", nargs="+", choices=CASES, default=[*CASES])
    options = parser.parse_args()
    for name in options.loads:
        found = measure(CASES[name], options.requests, options.rounds)
        print(json.dumps({"load": name} | found), flush=True)


if __name__ == "__main__":
    main()
