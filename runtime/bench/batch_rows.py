"""Rows of a batch through the engine: tokens a second, idle time of the device, times of steps."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.plans.lengths_file import read_lengths
from tokenspeed_plan.plans.schema import Plan, Program
from tokenspeed_plan.runtime.engine import Engine
from tokenspeed_plan.runtime.execution.bound_programs import BoundPrograms, Part
from tokenspeed_plan.runtime.execution.launch import AroundLaunch
from tokenspeed_plan.runtime.request import Request, SamplingParams

ROWS_PER_SEQUENCE = 3  # rows for each sequence that runs at once, where nothing is said
DEFINITIONS = {
    "tokens_per_s_in": "tokens of prompts, cached ones included, over the wall time",
    "tokens_per_s_out": "generated tokens over the wall time",
    "idle_share": "time between the first and the last step in which the device ran none",
    "host_us_per_step": "time of a step that is neither a replay nor waiting for its tokens",
    "predicted": "of all rows, by the planner's model of a batch, before any of them ran",
    "us": "mean time on the device of the steps of a program",
}


@dataclass(frozen=True, slots=True)
class Row:
    """Lengths of one row of a batch."""

    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Random rows: prompts are alike in their first `shared` tokens, answers as long as asked."""

    rows: tuple[Row, ...]
    seed: int = 0
    shared: int = 0

    @classmethod
    def of(
        cls,
        plan: Plan,
        count: int | None = None,
        prompt_tokens: int | None = None,
        output_tokens: int | None = None,
        lengths: Path | None = None,
        seed: int = 0,
        shared: int | None = None,
    ) -> Rows:
        """Rows of given lengths; what is not given is that of the plan's workload.

        Args:
            plan: of its limits and its spec.
            count: how many; three for each sequence that the plan runs at once.
            prompt_tokens: of each row.
            output_tokens: of each row.
            lengths: a file with the lengths of rows, which are repeated for `count` of them.
            seed: of the random tokens.
            shared: tokens with which all prompts begin, in addition to their own; without a file
                of lengths, as many as in the workload where it is None.

        Raises:
            SpecError: the file cannot be read.
            RequestError: the plan cannot hold a row.
        """
        alike = _stated(plan, "shared_prompt_tokens", 0)
        if shared is None:
            shared = 0 if lengths else alike
        prompt = prompt_tokens or max(_stated(plan, "first_turn_tokens", 1024) - alike, 1)
        output = output_tokens or _stated(plan, "output_tokens", 256)
        kinds = [Row(prompt, output)]
        if lengths is not None:
            found = read_lengths(lengths)
            kinds = [Row(row.prompt_tokens, row.output_tokens or output) for row in found]
            count = count or len(kinds)
        kinds = [Row(shared + kind.prompt_tokens, kind.output_tokens) for kind in kinds]
        count = count or ROWS_PER_SEQUENCE * plan.pool.limits.max_seqs
        rows = tuple(row for _, row in zip(range(count), _cycle(kinds), strict=False))
        longest = max(rows, key=lambda row: row.prompt_tokens + row.output_tokens)
        needed, most = longest.prompt_tokens + longest.output_tokens, plan.pool.limits.max_seq_len
        if needed > most:
            raise RequestError(
                f"a row of {longest.prompt_tokens} tokens in and {longest.output_tokens} out is "
                f"longer than the plan's {most}",
                "lower `--prompt` or `--out`, or plan for longer rows",
            )
        return cls(rows, seed, shared)


def _cycle(rows: list[Row]) -> Iterator[Row]:
    for kinds in repeat(rows):
        yield from kinds


def _stated(plan: Plan, name: str, default: int) -> int:
    """A length of the plan's workload: the mean, where lengths vary."""
    workload = plan.spec.get("workload")
    value = workload.get(name) if isinstance(workload, Mapping) else None
    if isinstance(value, Mapping):
        value = value.get("mean")
    if isinstance(value, (int, float)) and value >= 1:
        return round(value)
    return default


@dataclass(frozen=True, slots=True)
class _Step:
    """One replay: its tokens, and marks at its begin and end."""

    program: Program
    num_tokens: int
    begin: Any
    end: Any


@dataclass(slots=True)
class TimedLaunch(AroundLaunch):
    """Notes when each replay begins and ends on the device."""

    device: str
    steps: list[_Step] = field(default_factory=list)

    def run(
        self,
        programs: BoundPrograms,
        program: Program,
        num_tokens: int,
        num_seqs: int,
        part: Part = "whole",
    ) -> None:
        """As the launch inside, between two marks."""
        begin = self._mark()
        self.inner.run(programs, program, num_tokens, num_seqs, part)
        self.steps.append(_Step(program, num_tokens, begin, self._mark()))

    def _mark(self) -> Any:
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def us(self, begin: Any, end: Any) -> float:
        """Microseconds from one mark to another; all steps must be over."""
        if self.device == "cpu":
            return float(end - begin) * 1e6
        return float(begin.elapsed_time(end)) * 1e3


def run_rows(engine: Engine, launch: TimedLaunch, options: Rows) -> dict[str, Any]:
    """Run all rows and measure them.

    Args:
        engine: of the plan.
        launch: the one that it starts replays with.
        options: the rows.
    """
    requests = list(_requests(engine, options))
    engine.generate([requests[0].prompt_ids[:1]], SamplingParams(max_tokens=2, ignore_eos=True))
    launch.steps.clear()
    before = asdict(engine.metrics)
    loads: list[tuple[int, int]] = []
    begun = time.perf_counter()
    for request in requests:
        engine.add(request)
    while engine.num_unfinished:
        loads.append(_load(engine))
        for done in engine.step():
            done.check()
    wall_s = time.perf_counter() - begun
    if launch.device != "cpu":
        torch.cuda.synchronize()
    spent = {name: value - before[name] for name, value in asdict(engine.metrics).items()}
    return {
        "model": engine.plan.model.name,
        "plan": engine.plan.digest,
        "rows": len(options.rows),
        "seed": options.seed,
        "wall_s": wall_s,
        **_rates(options.rows, wall_s),
        "idle_share": _idle_share(launch),
        "host_us_per_step": spent["host_s"] / max(spent["steps"], 1) * 1e6,
        **{name: spent[name] for name in ("steps", "decode_steps", "preemptions", "hit_tokens")},
        **dict(zip(("mean_sequences", "mean_context"), _mean_load(loads), strict=True)),
        "programs": _programs(launch),
        "definitions": DEFINITIONS,
    }


def _requests(engine: Engine, options: Rows) -> Iterator[Request]:
    random = torch.Generator().manual_seed(options.seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, engine.vocab_size, (count,), generator=random).tolist()

    shared = tokens(options.shared)
    for number, row in enumerate(options.rows):
        ids = (*shared, *tokens(row.prompt_tokens - options.shared))
        params = SamplingParams(max_tokens=row.output_tokens, ignore_eos=True)
        yield Request(str(number), ids, params)


def _load(engine: Engine) -> tuple[int, int]:
    """Running sequences, and tokens that they have in all."""
    running = engine.scheduler.running
    return len(running), sum(sequence.num_computed for sequence in running)


def _mean_load(loads: list[tuple[int, int]]) -> tuple[float, float]:
    """Mean sequences at once, and mean tokens of one."""
    sequences, tokens = (sum(column) for column in zip(*loads, strict=True))
    return sequences / len(loads), tokens / max(sequences, 1)


def _rates(rows: Iterable[Row], wall_s: float) -> dict[str, float]:
    tokens_in = sum(row.prompt_tokens for row in rows)
    tokens_out = sum(row.output_tokens for row in rows)
    return {
        "tokens_in": tokens_in,
        "tokens_out": tokens_out,
        "tokens_per_s_in": tokens_in / wall_s,
        "tokens_per_s_out": tokens_out / wall_s,
    }


def _idle_share(launch: TimedLaunch) -> float:
    """The part of the time from the first step to the last in which none ran."""
    busy_us = sum(launch.us(step.begin, step.end) for step in launch.steps)
    whole_us = launch.us(launch.steps[0].begin, launch.steps[-1].end)
    return max(1.0 - busy_us / whole_us, 0.0)


def _programs(launch: TimedLaunch) -> list[dict[str, Any]]:
    """The steps of each program, the smallest program of a phase first."""
    steps: dict[str, list[_Step]] = defaultdict(list)
    for step in launch.steps:
        steps[step.program.name].append(step)
    ordered = sorted(steps.values(), key=lambda same: _place(same[0].program))
    return [_program(launch, same) for same in ordered]


def _place(program: Program) -> tuple[str, int]:
    return program.phase, program.bucket


def _program(launch: TimedLaunch, steps: list[_Step]) -> dict[str, Any]:
    times_us = [launch.us(step.begin, step.end) for step in steps]
    program = steps[0].program
    return {
        "phase": program.phase,
        "bucket": program.bucket,
        "depth": program.depth,
        "steps": len(steps),
        "mean_tokens": statistics.mean(step.num_tokens for step in steps),
        "us": statistics.mean(times_us),
        "p95_us": sorted(times_us)[math.ceil(0.95 * len(times_us)) - 1],
    }


def as_text(found: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [
        f"{found['rows']} rows, {found['tokens_in']} tokens in, {found['tokens_out']} out, in "
        f"{found['wall_s']:.2f} s; {found['mean_sequences']:.1f} at once, "
        f"of {found['mean_context']:.0f} tokens",
        f"  {found['tokens_per_s_out']:.1f} tokens/s out{_beside(found)}, "
        f"{found['tokens_per_s_in']:.1f} in",
        f"  device idle {found['idle_share']:.1%}; host {found['host_us_per_step']:.0f} us a step; "
        f"{found['preemptions']:.0f} preemptions, {found['hit_tokens']:.0f} tokens from the cache",
        f"  {'program':<16} {'steps':>6} {'us':>10} {'p95':>10} {'predicted':>10} {'floor':>9} "
        f"{'of it':>6}",
    ]
    lines += map(_program_text, found["programs"])
    return "\n".join(lines)


def _beside(found: dict[str, Any]) -> str:
    if "predicted" not in found:
        return ""
    predicted = found["predicted"]["output_tokens_per_s"]
    error = predicted / found["tokens_per_s_out"] - 1.0
    return f" (predicted {predicted:.1f}, off by {error:+.1%})"


def _program_text(program: dict[str, Any]) -> str:
    name = f"{program['phase']}/{program['bucket']}"
    text = f"  {name:<16} {program['steps']:>6} {program['us']:>10.1f} {program['p95_us']:>10.1f}"
    if "floor_us" not in program:
        return text
    return (
        f"{text} {program['predicted_us']:>10.1f} {program['floor_us']:>9.1f} "
        f"{program['share_of_floor']:>6.1%}"
    )
