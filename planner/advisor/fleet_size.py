"""How many machines answer a batch before its deadline, and what they cost.

Rows are shared by leases, so machines do not wait for each other: n of them take an n-th of the
time of one, and at the end no longer than one row. The slow end of the prediction's interval
counts. Not in it: reading the weights and queueing for the machines.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenspeed_plan.planner.advisor.numbers import digits
from tokenspeed_plan.planner.advisor.prediction import Prediction
from tokenspeed_plan.plans.errors import SpecError

_QUANTITY = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)([a-zA-Z]?)")
_TIMES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True)
class Job:
    """A batch and the time that it may take."""

    rows: int
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Fleet:
    """Machines of one kind for a job.

    Attributes:
        machines: how many; each has the GPUs of the deployment.
        gpus: of all of them.
        rows_per_s: of one, at the slow end of the interval.
        total_s: from the first row to the last.
        cost_usd: of all GPUs for that time.
    """

    machines: int
    gpus: int
    rows_per_s: float
    total_s: float
    cost_usd: float

    def as_json(self) -> dict[str, Any]:
        """The numbers, rounded."""
        return {
            "machines": self.machines,
            "gpus": self.gpus,
            "rows_per_s": digits(self.rows_per_s),
            "total_s": digits(self.total_s),
            "cost_usd": digits(self.cost_usd),
        }


def parse_count(text: str) -> int:
    """A number of rows: 20000, 500k, 10M.

    Raises:
        SpecError: it is none.
    """
    count = round(_quantity(text, _TIMES))
    if count < 1:
        raise SpecError(f"`--rows {text:.40}` is no number of rows", "such as 20000, 500k or 10M")
    return count


def parse_seconds(text: str) -> float:
    """A time: 90m, 6h, 1.5d.

    Raises:
        SpecError: it is none.
    """
    seconds = _quantity(text, _SECONDS)
    if not seconds:
        raise SpecError(f"`--deadline {text:.40}` is no time", "such as 90m, 6h or 1.5d")
    return seconds


def _quantity(text: str, units: Mapping[str, int]) -> float:
    """A number with one of some units behind it; 0 where it is none."""
    found = _QUANTITY.fullmatch(text)
    if found is None or found[2] not in units:
        return 0.0
    return float(found[1]) * units[found[2]]


def machines_for(load: float, most: float, best: Prediction) -> dict[str, float]:
    """How many machines a load takes, and what they cost in an hour.

    Args:
        load: users, or turns a second.
        most: what one machine answers in time.
        best: the deployment of one machine.
    """
    machines = math.ceil(load / most)
    gpus = machines * best.candidate.num_gpus
    return {"machines": machines, "gpus": gpus, "usd_per_hour": digits(gpus * best.price_per_hour)}


def fleet_for(job: Job, best: Prediction) -> Fleet | None:
    """The fewest machines that answer all rows in time; None where one row takes too long."""
    slow = 1.0 + best.error
    row_s = best.turn.turn_us * 1e-6 * slow
    rows_per_s = best.tokens_per_s / best.output_tokens / slow
    left_s = job.deadline_s - row_s
    if left_s <= 0:
        return None
    alone_s = job.rows / rows_per_s
    machines = math.ceil(alone_s / left_s)
    total_s = alone_s / machines + row_s
    gpus = machines * best.candidate.num_gpus
    cost_usd = gpus * best.price_per_hour * total_s / 3600
    return Fleet(machines, gpus, rows_per_s, total_s, cost_usd)
