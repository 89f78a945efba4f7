"""The load that a spec's workload is: its conversations, with their lengths and their times."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenspeed_plan.planner.spec import WorkloadSpec

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.simulation.load import Turns, Users


@dataclass(frozen=True, slots=True)
class LoadSize:
    """How much of a workload is asked for.

    Attributes:
        requests: turns of all conversations together, about.
        users: conversations at once; None where turns arrive by themselves.
        turns_per_s: that arrive in a second, at random times.
        think_s: from an answer to the next turn of its conversation.
        seed: of lengths, tokens and times.
    """

    requests: int
    users: int | None
    turns_per_s: float | None = None
    think_s: float = 0.0
    seed: int = 0


def spec_load(workload: WorkloadSpec, size: LoadSize, vocab_size: int) -> Users:
    """The conversations of a workload, as its lengths are spread."""
    from tokenspeed_plan.runtime.simulation.load import Users

    return Users(
        _talks(workload, size),
        size.users,
        (size.turns_per_s or 0.0) / workload.turns,
        size.think_s,
        vocab_size,
        size.seed,
    )


def _talks(workload: WorkloadSpec, size: LoadSize) -> list[Turns]:
    """The conversations, with lengths as the workload spreads them."""
    from tokenspeed_plan.runtime.simulation.load import Turns

    turns = workload.turns
    count = math.ceil(size.requests / turns)
    prompts = workload.prompts.sample(count, size.seed)
    outputs = workload.outputs.sample(count * turns, size.seed + 1)
    return [
        Turns(prompt, workload.turn_tokens, tuple(outputs[number * turns : (number + 1) * turns]))
        for number, prompt in enumerate(prompts)
    ]
