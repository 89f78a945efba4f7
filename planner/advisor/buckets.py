"""Which sizes of decode steps have a program of their own.

A batch is padded to the next larger program. Powers of two always have one. Between them, rows of a
batch get those that save more of its steps than the capture of a graph takes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import cache

from tokenspeed_plan.planner.advisor.prediction import Prediction, Predictor
from tokenspeed_plan.planner.advisor.workload import conversation
from tokenspeed_plan.planner.passes.limits import decode_buckets

MAX_BUCKETS = 20
# To bind, capture and load one more program: 0.04 to 0.08 s on an H200, where a graph of 500
# launches takes less than 2 MB.
CAPTURE_US = 1e5
# Each octave is tried in so many parts, whose sizes are multiples of what tiles of rows are.
PARTS_OF_AN_OCTAVE = 8
LEAST_PART = 4


def choose_buckets(predictor: Predictor, best: Prediction) -> tuple[int, ...]:
    """The sizes of the decode programs of a deployment, rising; the last is its concurrency.

    Args:
        predictor: of the deployment.
        best: the deployment, with the steps that its batch takes where it has one.
    """
    num_seqs = predictor.spec.workload.num_seqs
    powers = decode_buckets(num_seqs)
    if best.run is None or not predictor.hardware.sm:  # a CPU pads nothing
        return powers
    candidate = best.candidate
    context = conversation(predictor.spec.workload).mean_context

    def step_us(size: int) -> float:
        knobs = candidate.knobs
        step = predictor.steps.decode(candidate.layout, size, context, knobs.depth, knobs.kv_dtype)
        return step.total_us

    return fitted_buckets(best.run.decode_steps, powers, step_us)


def fitted_buckets(
    steps: Mapping[int, int], kept: Sequence[int], step_us: Callable[[int], float]
) -> tuple[int, ...]:
    """The kept sizes and those between them that pay, at most `MAX_BUCKETS` of both.

    Args:
        steps: how many steps have so many sequences.
        kept: sizes that have a program anyway, rising; the last holds every step.
        step_us: microseconds of a step of the program of a size.
    """
    price_us = cache(step_us)
    graph_us = CAPTURE_US
    while True:
        found: list[int] = []
        for low, high in zip((0, *kept), kept, strict=False):
            found += _between(low, high, steps, price_us, graph_us)
        if len(found) <= max(MAX_BUCKETS, len(kept)):
            return tuple(found)
        graph_us *= 1.5


def _between(
    low: int, high: int, steps: Mapping[int, int], step_us: Callable[[int], float], graph_us: float
) -> list[int]:
    """The sizes over `low` up to `high`, that one included, with the least time in all.

    By dynamic programming: the best sets that end with each size, from the smallest on.
    """
    part = max((high - low) // PARTS_OF_AN_OCTAVE, LEAST_PART)
    sizes = [*range(low + part, high, part), high]
    counts = [0] * len(sizes)
    for num_seqs, count in steps.items():
        if low < num_seqs <= high:
            counts[bisect_left(sizes, num_seqs)] += count
    best: list[tuple[float, list[int]]] = [(0.0, [])]
    for index, size in enumerate(sizes):
        ends = []
        for begin in range(index + 1):
            before_us, chosen = best[begin]
            us = sum(counts[begin : index + 1]) * step_us(size)
            ends.append((before_us + us + graph_us, [*chosen, size]))
        best.append(min(ends))
    return best[-1][1]
