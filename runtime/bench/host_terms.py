"""What the host of the engine works for a step: of itself, for each sequence, for each new prompt.

Everything that a step does counts but waiting for its tokens: scheduling, inputs, the launch of a
graph, commits. On a CPU the replay itself is the device's part, and does not count. The kernels of
a prompt are launched one by one while the device computes, so these launches are told apart.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenspeed_plan.plans.schema import Program
from tokenspeed_plan.runtime.engine import Engine
from tokenspeed_plan.runtime.execution.bound_programs import BoundPrograms, Part
from tokenspeed_plan.runtime.execution.launch import AroundLaunch, HostValues
from tokenspeed_plan.runtime.request import Request, SamplingParams

PROMPT_TOKENS, OUTPUT_TOKENS = 32, 64  # of a row: short, so that prompts share a step


@dataclass(frozen=True, slots=True)
class HostTerms:
    """Microseconds of a step: `step_us`, and more for each sequence and for each new prompt.

    `prefill_us` is what a prefill step takes more than a decode step, whatever its prompts, and
    `launch_us` each launch of it, during which the device computes.
    """

    step_us: float
    seq_us: float
    prompt_us: float
    prefill_us: float = 0.0
    launch_us: float = 0.0


@dataclass(frozen=True, slots=True)
class HostStep:
    """A step: what it launched, the sequences of the step that it committed, and its host time.

    `launched_us` of it, where each kernel was launched by itself, were those of its `launches`.
    """

    phase: str
    seqs: int
    committed: int
    us: float
    launches: int = 0
    launched_us: float = 0.0


@dataclass(slots=True)
class WaitingLaunch(AroundLaunch):
    """Counts the seconds in which the host waits: for tokens, and on a CPU for the replay."""

    replays_itself: bool
    waited_s: float = 0.0
    launched_s: float = 0.0

    def run(
        self,
        programs: BoundPrograms,
        program: Program,
        num_tokens: int,
        num_seqs: int,
        part: Part = "whole",
    ) -> None:
        """As the launch inside."""
        begun = time.perf_counter()
        self.inner.run(programs, program, num_tokens, num_seqs, part)
        if self.replays_itself:
            self.waited_s += time.perf_counter() - begun
        elif not program.captured:
            self.launched_s += time.perf_counter() - begun

    def copy_to_host(self, *values: Tensor) -> HostValues:
        """As the launch inside; reading the values is waiting."""
        read = self.inner.copy_to_host(*values)

        def timed() -> tuple[list[int], ...]:
            begun = time.perf_counter()
            found = read()
            self.waited_s += time.perf_counter() - begun
            return found

        return timed


def measure_host(engine: Engine, launch: WaitingLaunch, sizes: Sequence[int]) -> HostTerms:
    """Run batches of so many sequences, and fit their host times.

    Args:
        engine: of a plan that holds the largest batch, without drafts.
        launch: the one that it starts replays with.
        sizes: sequences at once, at least two numbers.
    """
    steps = [step for size in sizes for step in _steps(engine, launch, size)]
    return fit(steps)


def _steps(engine: Engine, launch: WaitingLaunch, size: int) -> Iterator[HostStep]:
    """The steps of a batch of so many sequences, the first of which warm it up."""
    random = torch.Generator().manual_seed(size)
    params = SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    for number in range(size):
        ids = torch.randint(1, engine.vocab_size, (PROMPT_TOKENS,), generator=random).tolist()
        engine.add(Request(f"{size}-{number}", tuple(ids), params))
    committed = 0
    while engine.num_unfinished or engine.has_step_in_flight:
        launch.waited_s = launch.launched_s = 0.0
        begun = time.perf_counter()
        engine.step()
        us = (time.perf_counter() - begun - launch.waited_s) * 1e6
        batch = engine.loop.last_batch
        if batch is not None:
            seqs, program = len(batch.sequences), batch.program
            launched_us = launch.launched_s * 1e6
            yield HostStep(program.phase, seqs, committed, us, program.launches, launched_us)
            committed = seqs


def fit(steps: Sequence[HostStep]) -> HostTerms:
    """A line through the medians of full decode steps, and what prompts take beside it."""
    decode: dict[int, list[float]] = defaultdict(list)
    for step in steps:
        if step.phase == "decode" and step.seqs == step.committed:
            decode[step.seqs].append(step.us)
    medians = {seqs: statistics.median(times) for seqs, times in decode.items()}
    line = statistics.linear_regression(list(medians), list(medians.values()))
    seq_us, step_us = max(line.slope, 0.0), max(line.intercept, 0.0)
    prompts = [step for step in steps if step.phase == "prefill"]
    left = [
        (step.seqs, step.us - step.launched_us - step_us - seq_us * step.committed)
        for step in prompts
    ]
    prefill_us, prompt_us = _of_prompts(left)
    launches = [step.launched_us / step.launches for step in prompts if step.launched_us]
    launch_us = statistics.median(launches) if launches else 0.0
    return HostTerms(step_us, seq_us, prompt_us, prefill_us, launch_us)


def _of_prompts(left: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """What a prefill step takes by itself, and for each prompt; (prompts, microseconds) of steps.

    Each number of prompts counts once. Where no line has both, a step takes nothing by itself.
    """
    of_count: dict[int, list[float]] = defaultdict(list)
    for count, us in left:
        of_count[count].append(us)
    medians = {count: statistics.median(times) for count, times in of_count.items()}
    if len(medians) > 1:
        line = statistics.linear_regression(list(medians), list(medians.values()))
        if line.slope > 0 and line.intercept > 0:
            return line.intercept, line.slope
    each = statistics.median(us / count for count, us in left)
    return 0.0, max(each, 0.0)
