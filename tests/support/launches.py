"""Plans as for a GPU, and a launch that hands out its outputs as late as a GPU does."""

from __future__ import annotations

from torch import Tensor

from tokenspeed_plan.plans.schema import Plan, Program
from tokenspeed_plan.runtime.execution.bound_programs import BoundPrograms, Part
from tokenspeed_plan.runtime.execution.launch import (
    AroundLaunch,
    EagerLaunch,
    HostValues,
    Launch,
)


def captured(plan: Plan) -> Plan:
    """The plan as for a GPU: decode programs have a fixed size and are launched ahead."""
    programs = tuple(
        p.model_copy(update={"captured": p.phase == "decode"}) for p in plan.pool.programs
    )
    return plan.with_pool(programs=programs)


class LateLaunch(AroundLaunch):
    """Hands out the outputs of replays as a GPU does: only when asked for, and only in order."""

    def __init__(self, inner: Launch | None = None) -> None:
        super().__init__(inner or EagerLaunch())
        self.replays = self.heads = 0
        self.asked = 0
        self.waiting: list[int] = []

    def run(
        self,
        programs: BoundPrograms,
        program: Program,
        num_tokens: int,
        num_seqs: int,
        part: Part = "whole",
    ) -> None:
        full_size = (program.max_tokens, program.max_seqs)
        assert not program.captured or (num_tokens, num_seqs) == full_size
        self.replays += part != "head"
        self.heads += part == "head"
        self.inner.run(programs, program, num_tokens, num_seqs, part)

    def copy_to_host(self, *values: Tensor) -> HostValues:
        found, number = self.inner.copy_to_host(*values)(), self.replays
        self.asked += 1
        self.waiting.append(number)

        def wait() -> tuple[list[int], ...]:
            assert self.waiting.pop(0) == number
            return found

        return wait
