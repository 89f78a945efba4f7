"""The host's microseconds a step, without a model: what a GPU that takes no time would wait for.

    python benchmarks/host.py [--seqs 16,128,256,512] [--prompt 128] [--out 256] [--logprobs 0]

The plan is that of the demo model for an H200; its executor is a double that replays nothing and
returns random tokens at once. Twice as many requests as sequences are answered, so that sequences
end, begin and cross pages while others go on. A step is timed as a whole, with its scheduling, its
inputs (copied within the host's memory) and its commit, in time of its thread; those that launch a
decode step and those that launch a prefill step are shown apart. With another checkout first on
PYTHONPATH it measures that one.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenspeed_plan.planner import compile_plan, find_model
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.schema import Plan, Program
from tokenspeed_plan.runtime import Engine, Request, SamplingParams
from tokenspeed_plan.runtime.execution.arenas import Arenas
from tokenspeed_plan.runtime.execution.launch import HostValues
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory

DEMO = Path(__file__).parent.parent / "examples" / "demo" / "model"


def demo_plan(num_seqs: int, prompt: int, out: int) -> Plan:
    """The demo model for so many sequences on an H200, without kernels."""
    spec = Spec.model_validate(
        {
            "version": 1,
            "model": {"path": str(DEMO), "weights": "bf16"},
            "target": {"gpu": "H200", "count": 1},
            "workload": {
                "kind": "batch",
                "first_turn_tokens": prompt,
                "output_tokens": out,
                "concurrency": num_seqs,
            },
            "speculation": "off",
        }
    )
    return compile_plan(spec, find_model(spec))


class NoModel:
    """An executor that computes nothing."""

    def __init__(self, plan: Plan) -> None:
        io = [arena for arena in plan.pool.arenas if arena.name == "io"]
        self.plan = plan
        self._memory = PlanMemory(plan, Arenas(io), {})
        self._logits = torch.zeros(plan.pool.limits.max_seqs, 8)
        rng = random.Random(0)
        self._tokens = [rng.randrange(1, plan.model.vocab_size) for _ in range(10_007)]
        self._turn = 0

    def prepare(self) -> None:
        """Nothing."""

    def buffer(self, name: str, num_tokens: int, num_seqs: int) -> Tensor:
        """An io buffer; few logits, as a GPU would look at them beside the host."""
        if name == "logits":
            return self._logits[:num_seqs]
        return self._memory.buffer(name, num_tokens, num_seqs)

    def run(self, program: Program, num_tokens: int, num_seqs: int, *_: object) -> None:
        """Nothing."""

    def copy_page(self, source: int, target: int) -> int:
        """Nothing."""
        return 0

    def copy_to_host(self, *values: Tensor) -> HostValues:
        """Random tokens."""
        self._turn = (self._turn + 7919) % (len(self._tokens) - 1024)
        (value,) = values
        tokens = self._tokens[self._turn : self._turn + value.numel()]
        return lambda: (tokens,)


class Paced(NoModel):
    """An executor whose steps take a stated time, one after the other, and compute nothing."""

    def __init__(self, plan: Plan, step_us: float) -> None:
        super().__init__(plan)
        self._step_s = step_us * 1e-6
        self._free_s = 0.0

    def run(self, program: Program, num_tokens: int, num_seqs: int, *_: object) -> None:
        """Begin a step when the one before is over."""
        self._free_s = max(self._free_s, time.perf_counter()) + self._step_s

    def copy_to_host(self, *values: Tensor) -> HostValues:
        """Random tokens, when the last step is over."""
        end_s, read = self._free_s, super().copy_to_host(*values)

        def wait() -> tuple[list[int], ...]:
            time.sleep(max(0.0, end_s - time.perf_counter()))
            return read()

        return wait


def measure(
    plan: Plan, num_seqs: int, prompt: int, out: int, logprobs: int | None
) -> dict[str, list[float]]:
    """Microseconds of each step, by the phase of the step that it launched."""
    engine = Engine(plan, NoModel(plan))  # type: ignore[arg-type]
    rng = random.Random(1)
    for index in range(2 * num_seqs):
        ids = tuple(rng.randrange(plan.model.vocab_size) for _ in range(prompt))
        most = rng.randrange(out // 2, out + 1)
        params = SamplingParams(max_tokens=most, ignore_eos=True, num_logprobs=logprobs)
        engine.add(Request(str(index), ids, params))
    found: dict[str, list[float]] = defaultdict(list)
    gc.collect()
    gc.freeze()
    while engine.num_unfinished:
        begun = time.thread_time()
        engine.step()
        taken_us = (time.thread_time() - begun) * 1e6
        if engine.loop.last_batch is not None:
            full = len(engine.loop.last_batch.sequences) >= 0.9 * num_seqs
            phase: Any = engine.loop.last_batch.program.phase
            if phase == "prefill" or full:
                found[phase].append(taken_us)
    return found


def main() -> None:
    """Measure and print a row of a table for each number of sequences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seqs", default="16,128,256,512")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--out", type=int, default=256)
    parser.add_argument("--logprobs", type=int, default=None)
    args = parser.parse_args()
    print("| sequences | decode step, us: median | mean | p95 | prefill step, us: median | mean |")
    print("| --- | --- | --- | --- | --- | --- |")
    for num_seqs in map(int, args.seqs.split(",")):
        plan = demo_plan(num_seqs, args.prompt, args.out)
        found = measure(plan, num_seqs, args.prompt, args.out, args.logprobs)
        decode, prefill = sorted(found["decode"]), found["prefill"]
        print(
            f"| {num_seqs} | {statistics.median(decode):.0f} | {statistics.mean(decode):.0f} "
            f"| {decode[len(decode) * 95 // 100]:.0f} | {statistics.median(prefill):.0f} "
            f"| {statistics.mean(prefill):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
