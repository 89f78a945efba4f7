"""How wide an interval must be: each probe priced by what the others were measured at."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenspeed_plan.planner.advisor.calibration import Fit, Sample, fit

WITHIN = 0.9  # the share of steps that lie inside of their intervals
MIN_STEPS = 10


@dataclass(frozen=True, slots=True)
class HeldStep:
    """A measured step of a probe: its kernels, each with the number of its calls.

    `is_whole`: they are most of the step; else it was measured for a few of its kernels.
    """

    probe: str
    kernels: Sequence[tuple[int, Sample]]
    is_whole: bool = True


def error_share(steps: Sequence[HeldStep], launch_us: float) -> float | None:
    """The relative error of each kind of time with which so many steps lie in their intervals.

    Every step is priced by a fit of the other probes; a kernel of a class that these lack has no
    voice. None where there are too few steps, or one probe.
    """
    shares: list[float] = []
    for probe in sorted({step.probe for step in steps}):
        others = [sample for step in steps if step.probe != probe for _, sample in step.kernels]
        if not others:
            return None
        found = fit(others, launch_us)
        own = (step.kernels for step in steps if step.probe == probe and step.is_whole)
        shares += (share for kernels in own if (share := _needed(kernels, found)) is not None)
    if len(shares) < MIN_STEPS:
        return None
    return sorted(shares)[math.ceil(WITHIN * len(shares)) - 1]


def _needed(kernels: Iterable[tuple[int, Sample]], found: Fit) -> float | None:
    """The error of each kind with which an interval ends where a step was measured."""
    waits_us = memory_us = matrix_us = measured_us = 0.0
    for calls, sample in kernels:
        if sample.op_class not in found.residuals or sample.waiting_tokens:
            continue
        by_memory, by_matrix = found.prices[sample.op_class].busy(sample)
        waits_us += calls * found.waits_us[sample.op_class]
        memory_us += calls * by_memory
        matrix_us += calls * by_matrix
        measured_us += calls * sample.measured_us
    if not measured_us:
        return None
    off_us = abs(waits_us + memory_us + matrix_us - measured_us)
    return off_us / math.hypot(waits_us, memory_us, matrix_us)
