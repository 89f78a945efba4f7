"""What each kernel of a program costs in its place: the time of the program with it, less the time without it.

Caches are as cold and launches overlap as much as in a replay. Kernels that follow compute on whatever numbers lie
there, which takes as long; those that would take them for places in memory are left out together with their maker.
On a CPU nothing overlaps, and calls are timed by themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from tokenspeed_plan.plans.kernel_file import kind_of
from tokenspeed_plan.plans.schema import KernelCall, KernelSpec, Plan
from tokenspeed_plan.plans.types import Phase
from tokenspeed_plan.runtime.bench.clock import captured, time_us
from tokenspeed_plan.runtime.bench.replay import Replay
from tokenspeed_plan.runtime.executor import Executor, Instruction

LEFT_OUT = "advance"  # moves the inputs on, so that replays would differ
Bound = tuple[KernelCall, tuple[Instruction, ...]]


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
    plan: Plan, executor: Executor, phase: Phase, num_seqs: int, new_tokens: int, context: int
) -> list[Marginal]:
    """Each kernel of the program for `num_seqs` sequences of `context` tokens, `new_tokens` of them new.

    Raises:
        PlanError: the plan has no program, or no memory, for such a batch.
    """
    replay = Replay(plan, executor, phase, num_seqs, new_tokens, context)
    replay.run()
    steps = [
        (step, tuple(made))
        for step, made in executor.steps(replay.program, replay.tokens, replay.seqs)
        if isinstance(step, KernelCall) and kind_of(executor.kernels[step.kernel]) != LEFT_OUT
    ]
    taken = _alone(executor, steps) if replay.device == "cpu" else _left_out(executor, steps, phase)
    found = []
    for name, us in taken.items():
        calls = [step for step, _ in steps if step.kernel == name]
        kinds = tuple(part.kind for part in executor.kernels[name].parts)
        predicted_us = sum(step.predicted_us for step in calls) / len(calls)
        found.append(Marginal(name, kinds, replay.tokens, replay.seqs, len(calls), us / len(calls), predicted_us))
    return found


def _alone(executor: Executor, steps: Sequence[Bound]) -> dict[str, float]:
    """Microseconds of all calls of each kernel, by themselves."""
    names = dict.fromkeys(step.kernel for step, _ in steps)
    return {name: _time(executor, [s for s in steps if s[0].kernel == name], "cpu", 1) for name in names}


def _left_out(executor: Executor, steps: Sequence[Bound], phase: Phase) -> dict[str, float]:
    """Microseconds that the program loses with all calls of each kernel; makers of places come after their users."""
    count = 20 if phase == "decode" else 3
    whole_us = _time(executor, steps, "cuda", count)
    users = users_of_places(executor.kernels, [step for step, _ in steps])
    taken: dict[str, float] = {}
    for name in sorted(users, key=lambda name: len(users[name])):
        rest = [bound for bound in steps if bound[0].kernel not in {name, *users[name]}]
        lost_us = whole_us - _time(executor, rest, "cuda", count)
        taken[name] = max(lost_us - sum(taken[user] for user in users[name]), 0.0)
    return taken


def users_of_places(kernels: Mapping[str, KernelSpec], calls: Sequence[KernelCall]) -> dict[str, set[str]]:
    """For each kernel, those that take integers from it (chosen experts, sorted rows), and those that do from them."""
    made_by: dict[str, str] = {}
    direct: dict[str, set[str]] = {call.kernel: set() for call in calls}
    for call in calls:
        for param, value in zip(kernels[call.kernel].params, call.args, strict=True):
            if param.role == "input" and value in made_by:
                direct[made_by[value]].add(call.kernel)
            elif param.role == "output":
                made_by.pop(value, None)
                made_by |= {value: call.kernel} if param.tensor.dtype in ("i32", "i64") else {}
    return {name: _reached(direct, name) - {name} for name in direct}


def _reached(direct: Mapping[str, Collection[str]], start: str) -> set[str]:
    found, left = set(direct[start]), list(direct[start])
    while left:
        new = set(direct[left.pop()]) - found
        found |= new
        left += new
    return found


@torch.inference_mode()
def _time(executor: Executor, steps: Sequence[Bound], device: str, count: int) -> float:
    def run() -> None:
        for _, instructions in steps:
            executor.execute(instructions)

    return time_us(captured(run, device), device, count)
