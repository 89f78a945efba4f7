"""The time of one step, by what the machine spends it on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from operator import add, attrgetter

from tokenspeed_plan.planner.machines.hardware import TIME_KINDS


@dataclass(frozen=True, slots=True)
class StepTime:
    """Microseconds of one step by kind, and the number of launches behind them.

    `floor_us`: reading the needed weights and state once, at the memory's peak rate.
    """

    memory: float = 0.0
    matrix: float = 0.0
    launch: float = 0.0
    collective: float = 0.0
    host: float = 0.0
    launches: float = 0.0
    collectives: float = 0.0
    floor_us: float = 0.0

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

    def error_us(self, errors: Mapping[str, float]) -> float:
        """Half the width of the interval.

        Errors of different kinds are independent; those within a kind add up.

        Args:
            errors: the relative error of each kind of time.
        """
        errors_us = []
        for kind in TIME_KINDS:
            kind_us: float = getattr(self, kind)
            error_us = errors[kind] * kind_us
            errors_us.append(error_us)
        return math.hypot(*errors_us)

    @property
    def bound(self) -> str:
        """The kind that takes the most time."""
        times_us = [getattr(self, kind) for kind in TIME_KINDS]
        longest = times_us.index(max(times_us))
        return TIME_KINDS[longest]


_NAMES = [each.name for each in fields(StepTime)]
_values = attrgetter(*_NAMES)
