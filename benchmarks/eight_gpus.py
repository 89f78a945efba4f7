"""Large models on 4 and 8 GPUs of one host: what is predicted, and all of it measured in one call.

    python benchmarks/eight_gpus.py predict            # a table, on any machine
    python benchmarks/eight_gpus.py run OUT [--seconds 570] [--gpus 8] [--only WORD]

`run` plans each deployment, and measures its programs (decode of 1, 8 and 32 sequences at 1k, a
chunk of a prompt), an agent's conversation with simulated drafts, and a prompt of 50,000 tokens;
before that sums over ranks, after that ranks that are killed and frozen. Weights are random. Each
command's output goes into a file of OUT, with the prediction beside the figure. It begins nothing
that the time left has no room for: what matters most comes first. With `--gpus 2` the same is
rehearsed on two, with models that fit.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
TOKENSPEED = (sys.executable, "-P", "-c", "from tokenspeed_plan.planner.cli import main; main()")
SHORT = ("workload.turns=1", "workload.first_turn_tokens=1024", "workload.output_tokens=128")
BATCHES = (1, 8, 32)
ACCEPTANCE = "0.89,0.89,0.89,0.89"
CHUNK = 8192
ACROSS = 4096  # the hidden size of the largest model
COLUMNS = (
    "model",
    "GPUs",
    "TPOT at 1k of 1, 8, 32 sequences, ms",
    "floor at 1, ms",
    "prompt of 50,000, s",
    "agent with drafts: tokens/s in decode, ms a turn",
    "memory a GPU, GiB",
    "deployment of the agent",
)


@dataclass(frozen=True)
class Deployment:
    """A model on so many GPUs; `spec` is changed to them."""

    name: str
    spec: str
    gpus: int

    @property
    def changes(self) -> tuple[str, ...]:
        """What all its plans have in common."""
        return (f"target.count={self.gpus}", "parallelism=auto", "disaggregation=off")

    @property
    def steps(self) -> tuple[str, ...]:
        """Of the plan whose programs are measured: no drafts, up to 32 sequences."""
        return (*self.changes, "speculation=off", *SHORT, f"workload.concurrency={BATCHES[-1]}")

    @property
    def agent(self) -> tuple[str, ...]:
        """Of the plan for one agent, with drafts."""
        return (*self.changes, "speculation=auto", "workload.concurrency=1")


LARGE = "examples/qwen3.5-397b-h200x8/spec.yaml"
MIDDLE = "examples/qwen3.5-122b-h200x2/spec.yaml"
SMALL = "benchmarks/specs/qwen3.5-35b-a3b-h200x2.yaml"
DEMO = "benchmarks/specs/demo-h200x2-tp.yaml"
DEPLOYMENTS = (
    Deployment("397B-A17B FP8", LARGE, 8),
    Deployment("397B-A17B FP8", LARGE, 4),
    Deployment("122B-A10B bf16", MIDDLE, 8),
    Deployment("35B-A3B bf16", SMALL, 8),
    Deployment("122B-A10B bf16", MIDDLE, 4),
    Deployment("35B-A3B bf16", SMALL, 4),
    Deployment("122B-A10B bf16", MIDDLE, 2),
    Deployment("35B-A3B bf16", SMALL, 2),
)


@dataclass(frozen=True)
class Task:
    """A command, and the seconds that it may take."""

    name: str
    words: tuple[str, ...]
    limit_s: float


def tasks(gpus: int, folder: Path) -> Iterator[Task]:
    """Everything that is measured on so many GPUs, what matters most first."""
    for ranks in (each for each in (8, 4, 2) if each <= gpus):
        words = ("torchrun", "--nproc-per-node", str(ranks), "benchmarks/all_reduce.py")
        yield Task(f"sums-{ranks}", (*words, "--hidden", str(ACROSS), "--seconds", "5"), 60)
    for each in DEPLOYMENTS:
        if gpus == each.gpus or gpus // 2 == each.gpus > 2:
            yield from tasks_of(each, folder)
    bundle = str(folder / "demo")  # with weights, as a batch is answered
    yield Task("demo-plan", (*TOKENSPEED, "plan", DEMO, "-o", bundle), 60)
    faults = ("benchmarks/rank_faults.py", bundle, "--times", "1", "--faults", "kill1,stop1")
    yield Task("faults", (sys.executable, *faults), 120)


def tasks_of(each: Deployment, folder: Path) -> Iterator[Task]:
    """Plan a deployment twice, from specs that are written here, and measure it."""
    from tokenspeed_plan.planner.spec import load_spec

    name = f"{each.name.replace(' ', '-')}-{each.gpus}"
    for kind, changes in (("steps", each.steps), ("agent", each.agent)):
        bundle = str(folder / f"{name}-{kind}")
        spec = load_spec(ROOT / each.spec, changes).model_dump(mode="json", exclude_none=True)
        path = folder / f"{name}-{kind}.yaml"
        path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
        yield Task(f"{name}-{kind}-plan", (*TOKENSPEED, "plan", str(path), "-o", bundle), 150)
        bench = (*TOKENSPEED, "bench", bundle)
        if kind == "steps":
            for batch in BATCHES:
                words = ("--batch", str(batch), "--context", "1024")
                yield Task(f"{name}-decode-{batch}", (*bench, *words), 90)
            continue
        agent = (*bench, "--workload", "agentic", "--conversations", "1")
        yield Task(f"{name}-agent", (*agent, "--acceptance", ACCEPTANCE), 120)
        prompt = ("--turns", "1", "--output-tokens", "2")
        yield Task(f"{name}-prompt", (*agent, *prompt), 90)
        yield Task(f"{name}-chunk", (*bench, "--prefill", str(CHUNK)), 90)


def run(folder: Path, seconds: float, gpus: int, only: str) -> None:
    """Carry out the tasks, each with its output in a file."""
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + seconds
    for task in tasks(gpus, folder):
        if only not in task.name:
            continue
        left_s = until - time.monotonic()
        if left_s < 10:
            print(f"no time left for {task.name}", flush=True)
            continue
        begun = time.monotonic()
        with (folder / f"{task.name}.txt").open("w", encoding="utf-8") as file:
            file.write(f"$ {shlex.join(task.words[-12:])}\n")
            file.flush()
            try:
                code: object = subprocess.run(
                    task.words,
                    cwd=ROOT,
                    env=os.environ | {"PYTHONPATH": str(ROOT)},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=min(task.limit_s, left_s),
                ).returncode
            except subprocess.TimeoutExpired:
                code = "stopped"
        print(f"{task.name}: {code}, {time.monotonic() - begun:.0f} s", flush=True)


def predict() -> None:
    """Print what is predicted of every deployment, as a table."""
    from tokenspeed_plan.planner.advisor.candidate import SUPPORTED
    from tokenspeed_plan.planner.advisor.prediction import Prediction, Predictor
    from tokenspeed_plan.planner.advisor.rollback import allowed_rollbacks
    from tokenspeed_plan.planner.advisor.search import Search
    from tokenspeed_plan.planner.compile import find_model
    from tokenspeed_plan.planner.machines.target import target_hardware
    from tokenspeed_plan.planner.spec import load_spec
    from tokenspeed_plan.plans.types import GIB

    def best(each: Deployment, changes: Sequence[str]) -> Prediction:
        path = ROOT / each.spec
        spec = load_spec(path, tuple(changes))
        config, hardware = find_model(spec, path).config, target_hardware(spec)
        word, *_ = allowed_rollbacks(spec, config, hardware)
        predictor = Predictor(spec, config, hardware, rollback=word)
        return Search(predictor, SUPPORTED, each.gpus).run().best

    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for each in DEPLOYMENTS:
        steps = [best(each, (*each.steps, f"workload.concurrency={n}")) for n in BATCHES]
        agent = best(each, each.agent)
        times = ", ".join(f"{step.metrics['tpot_ms']:.3g}" for step in steps)
        row = (
            each.name,
            str(each.gpus),
            times,
            f"{steps[0].step.floor_us / 1e3:.2f}",
            f"{agent.metrics['first_turn_ttft_ms'] / 1e3:.2f}",
            f"{1e3 / agent.metrics['tpot_ms']:.0f}, {agent.metrics['turn_time_ms']:.0f}",
            f"{agent.memory.total / GIB:.1f}",
            str(agent.candidate),
        )
        print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    modes = parser.add_subparsers(dest="mode", required=True)
    modes.add_parser("predict")
    measured = modes.add_parser("run")
    measured.add_argument("out", type=Path)
    measured.add_argument("--seconds", type=float, default=570)
    measured.add_argument("--gpus", type=int, default=8)
    measured.add_argument("--only", default="", help="Tasks with this in their name.")
    options = parser.parse_args()
    if options.mode == "predict":
        predict()
    else:
        run(options.out.resolve(), options.seconds, options.gpus, options.only)


if __name__ == "__main__":
    main()
