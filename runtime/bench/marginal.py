"""What each kernel of a program costs in its place: the time of the program with it, less the time without it.

Caches are as cold and launches overlap as much as in a replay. Kernels that follow compute on what earlier replays
left, which takes as long. On a CPU nothing overlaps, and its calls are timed by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenspeed_plan.plans.kernel_file import kind_of
from tokenspeed_plan.plans.schema import KernelCall, Plan
from tokenspeed_plan.plans.types import Phase
from tokenspeed_plan.runtime.bench.clock import captured, time_us
from tokenspeed_plan.runtime.bench.replay import Replay
from tokenspeed_plan.runtime.executor import Executor, Instruction

LEFT_OUT = "advance"  # moves the inputs on, so that replays would differ


@dataclass(frozen=True, slots=True)
class Marginal:
    """One kernel: members, tokens and sequences, microseconds a call as measured and as the plan predicted."""

    kernel: str
    kinds: tuple[str, ...]
    num_tokens: int
    num_seqs: int
    calls: int
    measured_us: float
    predicted_us: float


def marginal_times(
    plan: Plan, executor: Executor, phase: Phase, num_seqs: int, count: int, context: int
) -> list[Marginal]:
    """Each kernel of the program for `num_seqs` sequences of `context` tokens, `count` of them new.

    Raises:
        PlanError: the plan has no program, or no memory, for such a batch.
    """
    replay = Replay(plan, executor, phase, num_seqs, count, context)
    replay.run()
    steps = [
        (step, tuple(made))
        for step, made in executor.steps(replay.program, replay.tokens, replay.seqs)
        if isinstance(step, KernelCall) and not _is_left_out(executor, step)
    ]
    on_gpu = replay.device != "cpu"
    rounds = 20 if on_gpu and phase == "decode" else 3 if on_gpu else 1
    whole_us = _time(executor, [made for _, made in steps], replay.device, rounds) if on_gpu else 0.0
    found = []
    for name in dict.fromkeys(step.kernel for step, _ in steps):
        calls = [step for step, _ in steps if step.kernel == name]
        timed = [made for step, made in steps if (step.kernel != name) == on_gpu]
        taken_us = abs(whole_us - _time(executor, timed, replay.device, rounds))
        kinds = tuple(part.kind for part in executor.kernels[name].parts)
        predicted_us = sum(step.predicted_us for step in calls) / len(calls)
        found.append(Marginal(name, kinds, replay.tokens, replay.seqs, len(calls), taken_us / len(calls), predicted_us))
    return found


def _is_left_out(executor: Executor, step: KernelCall) -> bool:
    return kind_of(executor.kernels[step.kernel]) == LEFT_OUT


@torch.inference_mode()
def _time(executor: Executor, steps: list[tuple[Instruction, ...]], device: str, count: int) -> float:
    def run() -> None:
        for step in steps:
            executor.execute(step)

    work: Callable[[], object] = captured(run, device)
    return time_us(work, device, count)
