"""The time of one step, by what the machine spends it on."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from operator import add, attrgetter

from tokenspeed_plan.planner.machines.hardware import TIME_KINDS, HardwareSpec


@dataclass(frozen=True, slots=True)
class StepTime:
    """Microseconds of one step by kind, and the number of launches behind them.

    `floor_us`: reading the needed weights and state once, at the memory's peak rate. `small`
    launches, and `small_us` of `launch`, are those of norms and other work of few bytes.
    `quantised` launches are products of quantised weights, without experts.
    """

    memory: float = 0.0
    matrix: float = 0.0
    launch: float = 0.0
    collective: float = 0.0
    host: float = 0.0
    launches: float = 0.0
    collectives: float = 0.0
    floor_us: float = 0.0
    small: float = 0.0
    small_us: float = 0.0
    quantised: float = 0.0

    @property
    def total_us(self) -> float:
        """The sum of all kinds."""
        kernels = self.memory + self.matrix + self.launch
        return kernels + self.collective + self.host

    def __add__(self, other: StepTime) -> StepTime:
        sums = map(add, _values(self), _values(other))
        return StepTime(*sums)

    def __mul__(self, count: float) -> StepTime:
        values = [count * value for value in _values(self)]
        return StepTime(*values)

    def error_us(self, hardware: HardwareSpec) -> float:
        """Half the width of the interval.

        Errors of a kind add up. Those of different kinds are independent where the machine was
        measured; where prices are another machine's, all may be wrong in the same direction.
        """
        errors_us = [hardware.errors[kind] * getattr(self, kind) for kind in TIME_KINDS]
        if hardware.borrows_prices:
            return math.fsum(errors_us)
        return math.hypot(*errors_us)

    @property
    def bound(self) -> str:
        """The kind that takes the most time."""
        times_us = [getattr(self, kind) for kind in TIME_KINDS]
        longest = times_us.index(max(times_us))
        return TIME_KINDS[longest]


_NAMES = [each.name for each in fields(StepTime)]
_values = attrgetter(*_NAMES)
