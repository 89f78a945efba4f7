"""Loads on the real engine beside what the simulator said of them before.

    python benchmarks/load_test.py predict DIR -o FORECAST.json [--seconds 12] [--loads lone,rate80]
    python benchmarks/load_test.py run DIR FORECAST.json [-o FIGURES.jsonl] [--limit S]
    python benchmarks/load_test.py table FIGURES.jsonl ...

`predict` needs no GPU. It sizes each load by its own simulation to about so many seconds, and
simulates it three times: with the predicted times of steps, and with those at both ends of their
intervals. `run` loads random weights once, runs the same requests (lengths, arrivals, seeds, random
tokens) one load after the other, and prints and writes each as it ends, with what the steps of each
program took. `table` has the errors of all of them, their means, and the share inside the interval.

Loads: a lone user, 16 users in a closed loop, requests at random times at 50 and 80 % of what the
plan answers with all sequences taken (by the simulation), 128 and 256 sequences at once, and four
agents, each of whose conversations has a long first turn and short ones after it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Read when PyTorch is loaded: OpenMP's idle threads sleep, as in all commands.
os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}

import torch

from tokenspeed_plan.planner.advisor.plan_prices import plan_steps
from tokenspeed_plan.planner.advisor.plan_steps import PlanSteps
from tokenspeed_plan.planner.token_lengths import Lengths
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.bench import prepare
from tokenspeed_plan.runtime.engine import Engine
from tokenspeed_plan.runtime.history.load_watch import LoadWatch
from tokenspeed_plan.runtime.loading.engine_loader import default_launch
from tokenspeed_plan.runtime.request import SamplingParams
from tokenspeed_plan.runtime.simulation.load import FILLER, Arrival, Turns, Users
from tokenspeed_plan.runtime.simulation.load_report import programs
from tokenspeed_plan.runtime.simulation.load_results import Answered, Simulated
from tokenspeed_plan.runtime.simulation.load_run import simulate

P95, LONGEST = 2.0, 4  # of lengths that vary, in means
LEAST_REQUESTS, MOST_REQUESTS = 24, 1200
TRIED = 96  # requests with which a load is sized
MEAN_CONTEXT = 1024  # of a step, where the width of its interval is taken
SPIN_S = 2e-4  # before an arrival, in which the driver does not sleep
FIGURES = ("tpot_ms", "ttft_p50_ms", "ttft_p95_ms", "tokens_per_s")
ASKED = {"tpot_ms": 0.08, "ttft_p50_ms": 0.12, "ttft_p95_ms": 0.20, "tokens_per_s": 0.08}
LOADS = ("lone", "users16", "rate50", "rate80", "batch128", "batch256", "agents4")


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """A load: its conversations, and how they come.

    Attributes:
        name: one of `LOADS`.
        users: conversations at once; None where they begin at random times.
        requests: of all conversations together.
        starts_per_s: of conversations that begin at random times.
        prompt, output: tokens, on average; they are log-normal, agents' are fixed.
        turns, added: of a conversation, and the tokens that each later turn adds.
        seed: of lengths, times and tokens.
    """

    name: str
    users: int | None
    requests: int
    starts_per_s: float
    prompt: int
    output: int
    turns: int = 1
    added: int = 0
    seed: int = 0

    def load(self, vocab_size: int) -> RandomTalks:
        """The requests; the same each time."""
        talks = list(self._talks())
        return RandomTalks(talks, self.users, self.starts_per_s, 0.0, vocab_size, self.seed)

    def _talks(self) -> Sequence[Turns]:
        count = max(self.requests // self.turns, 1)
        outputs = _sampled(self.output, count * self.turns, self.seed + 1)
        prompts = _sampled(self.prompt, count, self.seed)
        if self.turns > 1:
            prompts, outputs = [self.prompt] * count, [self.output] * count * self.turns
        of_turns = zip(*[iter(outputs)] * self.turns, strict=True)
        return [Turns(p, self.added, tuple(o)) for p, o in zip(prompts, of_turns, strict=True)]


def _sampled(mean: int, count: int, seed: int) -> list[int]:
    return Lengths(mean, round(P95 * mean), LONGEST * mean).sample(count, seed)


@dataclass
class RandomTalks(Users):
    """Conversations of random tokens: tokens that are all alike would go to the same experts."""

    def pop(self) -> Arrival:
        """The next turn, what is new in it random."""
        arrival = super().pop()
        talk = self._open[arrival.request.request_id]
        new = talk.turns.added if talk.num_done else talk.turns.prompt
        number = int(arrival.request.request_id.rpartition("-")[2])
        random = torch.Generator().manual_seed((self.seed << 24) + number)
        words = torch.randint(FILLER, self.vocab_size, (new,), generator=random).tolist()
        talk.token_ids[len(talk.token_ids) - new :] = words
        request = replace(arrival.request, prompt_ids=tuple(talk.token_ids))
        return Arrival(arrival.time_s, request, arrival.digests)


@dataclass(frozen=True, slots=True)
class AtTheEnd:
    """Times of steps at one end of their intervals; `side` is -1 or 1, and 0 in their middle."""

    times: PlanSteps
    side: int

    def prefill_us(self, tokens: int, seqs: int, context: float) -> float:
        """A prefill step."""
        middle_us = self.times.prefill_us(tokens, seqs, context)
        if not self.side:
            return middle_us
        steps, size = self.times.steps, 1 << tokens.bit_length()
        step = steps.prefill(self.times.layout, size, 0, self.times.kv_dtype)
        return middle_us * (1 + self.side * step.error_us(steps.hardware) / step.total_us)

    def decode_us(self, bucket: int, seqs: int, context: float) -> float:
        """A decode step."""
        middle_us = self.times.decode_us(bucket, seqs, context)
        if not self.side:
            return middle_us
        steps, depth = self.times.steps, self.times.depths[bucket]
        step = steps.decode(self.times.layout, bucket, MEAN_CONTEXT, depth, self.times.kv_dtype)
        return middle_us * (1 + self.side * step.error_us(steps.hardware) / step.total_us)

    def host_us(self, seqs: int, prompts: int) -> float:
        """The host before a step."""
        share = self.times.steps.hardware.errors["host"]
        return self.times.host_us(seqs, prompts) * (1 + self.side * share)


def figures(answers: Sequence[Answered], total_s: float) -> dict[str, float]:
    """The mean time of tokens after the first, percentiles of first ones, and the rate of all."""
    ttft_ms = sorted(answer.ttft_s * 1e3 for answer in answers)
    tpot_ms = [answer.tpot_s * 1e3 for answer in answers if answer.output_tokens > 1]
    return {
        "tpot_ms": statistics.fmean(tpot_ms),
        "ttft_p50_ms": ttft_ms[-(-50 * len(ttft_ms) // 100) - 1],
        "ttft_p95_ms": ttft_ms[-(-95 * len(ttft_ms) // 100) - 1],
        "tokens_per_s": sum(answer.output_tokens for answer in answers) / total_s,
    }


class Forecaster:
    """Simulates loads on a plan.

    Args:
        bundle: of the plan.
        seconds: that a load should take.
    """

    def __init__(self, bundle: Path, seconds: float) -> None:
        self.plan = load_plan(bundle)
        self.times = plan_steps(self.plan, bundle)
        self.seconds = seconds
        self._capacity: float | None = None

    def simulated(self, spec: LoadSpec, side: int = 0) -> Simulated:
        """A load, as it should be."""
        load = spec.load(self.plan.model.vocab_size)
        return simulate(self.plan, AtTheEnd(self.times, side), load)

    @property
    def capacity(self) -> float:
        """Requests a second with all sequences taken."""
        if self._capacity is None:
            seqs = self.plan.pool.limits.max_seqs
            full = replace(self._spec("batch256", 4 * seqs), users=seqs)
            self._capacity = full.requests / self.simulated(full).total_s
        return self._capacity

    def _spec(self, name: str, requests: int) -> LoadSpec:
        longest = self.plan.pool.limits.max_seq_len
        if name == "agents4":
            turns, added, output = 6, min(800, longest // 16), min(128, longest // 16)
            room = longest - turns * output - (turns - 1) * added - 1
            return LoadSpec(name, 4, requests, 0.0, min(8192, room), output, turns, added, 7)
        prompt, output = min(1024, longest // 8), min(128, longest // 8)
        users = {"lone": 1, "users16": 16, "batch128": 128, "batch256": 256}.get(name)
        rate = 0.0
        if users is None:
            rate = int(name.removeprefix("rate")) / 100 * self.capacity
        return LoadSpec(name, users, requests, rate, prompt, output, seed=LOADS.index(name))

    def sized(self, name: str) -> LoadSpec:
        """The load with as many requests as it answers in the time that it should take."""
        spec = self._spec(name, TRIED)
        least = max(LEAST_REQUESTS, 2 * (spec.users or 0))
        spec = replace(spec, requests=max(TRIED, least))
        wanted = round(spec.requests * self.seconds / self.simulated(spec).total_s)
        requests = min(max(wanted, least), MOST_REQUESTS)
        return replace(spec, requests=-(-requests // spec.turns) * spec.turns)

    def forecast(self, name: str) -> dict[str, Any]:
        """A load, and what it should be like, with the ends of each figure's interval."""
        spec = self.sized(name)
        middle, *others = (self.simulated(spec, side) for side in (0, -1, 1))
        ends = [figures(each.answers, each.total_s) for each in others]
        intervals = {
            key: [min(end[key] for end in ends), max(end[key] for end in ends)] for key in FIGURES
        }
        return {
            "load": asdict(spec),
            "predicted": figures(middle.answers, middle.total_s),
            "interval": intervals,
            "seconds": middle.total_s,
            "predicted_metrics": asdict(middle.metrics),
            "predicted_programs": programs(middle.steps),
        }


@torch.inference_mode()
def run_load(
    engine: Engine, spec: LoadSpec, limit_s: float, now: Callable[[], float] = time.perf_counter
) -> tuple[list[Answered], float]:
    """The answers of a load on the real engine, and its seconds; after the limit nobody asks."""
    load = spec.load(engine.vocab_size)
    arrived_s: dict[str, float] = {}
    late_s: dict[str, float] = {}  # from an arrival until the engine could take it
    answers: list[Answered] = []
    begun = now()
    while True:
        next_s, at_s = load.next_time_s(), now() - begun
        while next_s is not None and next_s <= at_s < limit_s:
            arrival = load.pop()
            name = arrival.request.request_id
            arrived_s[name], late_s[name] = arrival.time_s, now() - begun - arrival.time_s
            engine.add(arrival.request)
            next_s = load.next_time_s()
        if engine.num_unfinished or engine.has_step_in_flight:
            for done in engine.step():
                done.check()
                answered = Answered.of(arrived_s[done.request_id], done)
                ttft_s = answered.ttft_s + late_s[done.request_id]
                answers.append(replace(answered, ttft_s=ttft_s))
                load.answered(done, now() - begun)
        elif next_s is None or at_s >= limit_s:
            return answers, now() - begun
        elif next_s - at_s > SPIN_S:
            time.sleep(next_s - at_s - SPIN_S)


class Runner:
    """Runs loads on one load of random weights.

    Args:
        bundle: of the plan.
    """

    def __init__(self, bundle: Path) -> None:
        self.plan: Plan = load_plan(bundle)
        self.engine = Engine(self.plan, prepare(self.plan, bundle, None, default_launch(self.plan)))

    def run(self, forecast: dict[str, Any], most_s: float) -> dict[str, Any]:
        """The forecast with what was measured; nothing of other loads begins as its prompts do."""
        spec, engine = LoadSpec(**forecast["load"]), self.engine
        self._warm(spec)
        limit_s = min(most_s, 2.0 * forecast["seconds"] + 2.0)
        before = asdict(engine.metrics)
        watch = LoadWatch(engine)
        answers, total_s = run_load(engine, spec, limit_s)
        engine.loop.watch = None
        spent = {name: round(n - before[name], 6) for name, n in asdict(engine.metrics).items()}
        return forecast | {
            "answered": len(answers),
            "measured_s": total_s,
            "measured": figures(answers, total_s),
            "metrics": spent,
            "measured_programs": [row.model_dump(mode="json") for row in watch.rows()],
        }

    def _warm(self, spec: LoadSpec) -> None:
        """Answer a few rows, so that what is done once is done; then collect no garbage."""
        engine = self.engine
        count = min(spec.users or 16, self.plan.pool.limits.max_seqs)
        random = torch.Generator().manual_seed(1 << 20)
        size = min(spec.prompt, self.plan.pool.limits.max_tokens)
        rows = torch.randint(FILLER, engine.vocab_size, (count, size), generator=random).tolist()
        engine.generate(rows, SamplingParams(max_tokens=4, ignore_eos=True))
        gc.collect()
        gc.freeze()


def off(found: dict[str, Any], key: str) -> float:
    """The error of a figure, as a share of what was measured."""
    return float(found["predicted"][key] / found["measured"][key] - 1.0)


def is_inside(found: dict[str, Any], key: str) -> bool:
    """Whether what was measured lies in the interval."""
    low, high = found["interval"][key]
    return bool(low <= found["measured"][key] <= high)


def lines_of(found: dict[str, Any]) -> list[str]:
    """A load as text: what was predicted, its interval, what was measured, the error."""
    load, total_s = found["load"], found.get("measured_s", found["seconds"])
    head = (
        f"{found.get('plan', '')} {load['name']}: {found.get('answered', load['requests'])} "
        f"requests in {total_s:.1f} s (predicted {found['seconds']:.1f})"
    )
    lines = [head.strip()]
    for key in FIGURES:
        low, high = found["interval"][key]
        text = f"  {key:<13}{found['predicted'][key]:>10.2f} ({low:.2f} to {high:.2f})"
        if "measured" in found:
            inside = "inside" if is_inside(found, key) else "outside"
            text += f"{found['measured'][key]:>12.2f} {off(found, key):>+7.1%} {inside}"
        lines.append(text)
    return lines


def table(every: Sequence[dict[str, Any]]) -> list[str]:
    """All loads as Markdown, then the means of their errors beside what is asked."""
    lines = [
        "| plan | load | requests | " + " | ".join(FIGURES) + " |",
        "| --- " * (3 + len(FIGURES)) + "|",
    ]
    for found in every:
        cells = [_cell(found, key) for key in FIGURES]
        load, count = found["load"], found["answered"]
        lines.append(f"| {found['plan']} | {load['name']} | {count} | {' | '.join(cells)} |")
    means = {key: statistics.fmean(abs(off(each, key)) for each in every) for key in FIGURES}
    asked = [f"{means[key]:.1%} (asked {ASKED[key]:.0%})" for key in FIGURES]
    inside = statistics.fmean(is_inside(each, key) for each in every for key in FIGURES)
    lines.append(f"| mean error | {inside:.0%} inside (asked 90 %) | | {' | '.join(asked)} |")
    return lines


def _cell(found: dict[str, Any], key: str) -> str:
    mark = "" if is_inside(found, key) else ", outside"
    predicted, measured = found["predicted"][key], found["measured"][key]
    return f"{predicted:.4g}, {measured:.4g}: {off(found, key):+.1%}{mark}"


def _predict(options: argparse.Namespace) -> None:
    forecaster, found = Forecaster(options.bundle, options.seconds), []
    for name in options.loads.split(","):
        found.append(forecaster.forecast(name))
        print("\n".join(lines_of(found[-1])), flush=True)
        options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


def _run(options: argparse.Namespace) -> None:
    begun = time.perf_counter()
    forecasts = json.loads(options.forecast.read_text(encoding="utf-8"))
    runner = Runner(options.bundle)
    print(f"{options.bundle.name}: ready in {time.perf_counter() - begun:.1f} s", flush=True)
    for forecast in forecasts:
        left_s = options.limit - (time.perf_counter() - begun)
        if left_s < forecast["seconds"]:
            print(f"{forecast['load']['name']}: no time left", flush=True)
            continue
        found = {"plan": options.bundle.name} | runner.run(forecast, left_s)
        print("\n".join(lines_of(found)), flush=True)
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")


def _table(options: argparse.Namespace) -> None:
    texts = [path.read_text(encoding="utf-8") for path in options.figures]
    every = [json.loads(line) for text in texts for line in text.splitlines()]
    print("\n".join(table(every)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    predict = commands.add_parser("predict")
    predict.add_argument("bundle", type=Path)
    predict.add_argument("-o", "--out", type=Path, required=True)
    predict.add_argument("--seconds", type=float, default=12.0)
    predict.add_argument("--loads", default=",".join(LOADS))
    predict.set_defaults(work=_predict)
    run = commands.add_parser("run")
    run.add_argument("bundle", type=Path)
    run.add_argument("forecast", type=Path)
    run.add_argument("-o", "--out", type=Path)
    run.add_argument("--limit", type=float, default=1e9, help="seconds in all")
    run.set_defaults(work=_run)
    shown = commands.add_parser("table")
    shown.add_argument("figures", type=Path, nargs="+")
    shown.set_defaults(work=_table)
    options = parser.parse_args()
    options.work(options)


if __name__ == "__main__":
    main()
