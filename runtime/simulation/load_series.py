"""A simulated load over time, as numbers that a page draws: in bins, however long it is.

Letters: B bins of equal length, S steps, R requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tokenspeed_plan.runtime.history.sparse_sample import SparseSample
from tokenspeed_plan.runtime.scheduling.scheduler import Scheduler
from tokenspeed_plan.runtime.simulation.load_results import Answered, Simulated
from tokenspeed_plan.runtime.simulation.virtual_steps import StepRecord

BINS = 8192  # a page shows some of them in one column, or fewer of them where it is zoomed in
MOST_STEPS = 30_000  # a page has each of them; of more it has the bins alone
MOST_REQUESTS = 20_000  # of more every second, third, ... is a dot
LOOKS = 1024


class PageLooks:
    """Pages in use, looked at while a load is simulated.

    Attributes:
        looks: the time, pages that running sequences hold, and those that the cache has besides.
    """

    def __init__(self) -> None:
        self.looks = SparseSample[tuple[float, int, int]](LOOKS)

    def __call__(self, scheduler: Scheduler) -> None:
        """Look at the scheduler, where it is time to."""
        if self.looks.is_due():
            pages = scheduler.cache.pages
            held = set[int]().union(*(sequence.pages for sequence in scheduler.running))
            cached = len(pages) - pages.num_free - len(held)
            self.looks.keep((scheduler.clock(), len(held), cached))


def series(found: Simulated, pages: PageLooks, num_pages: int) -> dict[str, Any]:
    """What a page draws of a load with at least one answer.

    Args:
        found: the load.
        pages: what was looked at meanwhile.
        num_pages: of the plan.
    """
    edges_B = np.linspace(0.0, found.total_s, BINS + 1)
    drawn: dict[str, Any] = {
        "total_s": found.total_s,
        "num_pages": num_pages,
        "bins": _step_bins(found.steps, edges_B) | _request_bins(found.answers, edges_B),
        "pages": [[round(time_s, 6), *counts] for time_s, *counts in pages.looks.values],
        "requests": _dots(found.answers),
        "steps": _bars(found.steps),
    }
    if found.prompts is not None and found.prompts.steps:
        drawn["bins"]["prompts"] = _step_bins(found.prompts.steps, edges_B)["prefill"]
        drawn["prompt_steps"] = _bars(found.prompts.steps)
    return drawn


def _step_bins(steps: Sequence[StepRecord], edges_B: np.ndarray) -> dict[str, list[float]]:
    """Per mille of each bin in which the device prefills and decodes, and sequences that decode."""
    begin_S = np.array([step.begin_s for step in steps])
    end_S = np.array([step.end_s for step in steps])
    seqs_S = np.array([float(step.seqs) for step in steps])
    decodes_S = np.array([step.phase == "decode" for step in steps])
    times_S = end_S - begin_S
    knots = np.stack((begin_S, end_S), axis=1).ravel()

    def shares(weights_S: np.ndarray) -> np.ndarray:
        """The mean of the weights over each bin; between steps they are 0."""
        sums_S = np.cumsum(weights_S * times_S)
        known = np.stack((np.concatenate(([0.0], sums_S[:-1])), sums_S), axis=1).ravel()
        means: np.ndarray = np.diff(np.interp(edges_B, knots, known)) / np.diff(edges_B)
        return means

    decode = shares(decodes_S.astype(float))
    batch = shares(decodes_S * seqs_S) / np.maximum(decode, 1e-9)
    return {
        "prefill": _rounded(1e3 * shares(1.0 - decodes_S)),
        "decode": _rounded(1e3 * decode),
        "batch": _rounded(np.where(decode > 1e-6, batch, 0.0), 1),
    }


def _request_bins(answers: Sequence[Answered], edges_B: np.ndarray) -> dict[str, list[float]]:
    """Requests that wait and run, and tokens of prompts that begin, in each bin."""
    arrival_R = np.array([answer.arrival_s for answer in answers])
    start_R = arrival_R + [answer.queue_s for answer in answers]
    lasts_R = [answer.ttft_s + answer.decode_s for answer in answers]
    waiting, most = _levels(arrival_R, start_R, edges_B)
    running, _ = _levels(start_R, arrival_R + lasts_R, edges_B)
    prompts_R = [answer.prompt_tokens for answer in answers]
    cached_R = [answer.cached_tokens for answer in answers]
    prompts, _ = np.histogram(start_R, edges_B, weights=prompts_R)
    cached, _ = np.histogram(start_R, edges_B, weights=cached_R)
    return {
        "waiting": _rounded(waiting, 1),
        "most_waiting": _rounded(most),
        "running": _rounded(running, 1),
        "prompt_tokens": _rounded(prompts),
        "cached_tokens": _rounded(cached),
    }


def _levels(
    begin_R: np.ndarray, end_R: np.ndarray, edges_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How many are between their begin and their end: the mean and the most in each bin."""
    times = np.concatenate((begin_R, end_R))
    changes = np.concatenate((np.ones(len(begin_R)), -np.ones(len(end_R))))
    order = np.argsort(times, kind="stable")
    times, levels = times[order], np.cumsum(changes[order])
    is_last = np.append(times[1:] > times[:-1], True)  # of all changes at one time
    times, levels = times[is_last], levels[is_last]
    areas = np.concatenate(([0.0], np.cumsum(levels[:-1] * np.diff(times))))
    means = np.diff(np.interp(edges_B, times, areas)) / np.diff(edges_B)
    # The level with which a bin begins, and each that comes in it.
    before = np.searchsorted(times, edges_B[:-1], side="right") - 1
    most = np.where(before >= 0, levels[before], 0.0)
    bins = np.clip(np.searchsorted(edges_B, times, side="right") - 1, 0, len(most) - 1)
    np.maximum.at(most, bins, levels)
    return means, most


def _dots(answers: Iterable[Answered]) -> list[list[float | None]]:
    """Requests by their arrival: seconds, TTFT and TPOT in milliseconds; none of one token."""
    ordered = sorted(answers, key=lambda answer: answer.arrival_s)
    stride = -(-len(ordered) // MOST_REQUESTS)
    return [
        [
            round(answer.arrival_s, 6),
            round(answer.ttft_s * 1e3, 3),
            round(answer.tpot_s * 1e3, 3) if answer.output_tokens > 1 else None,
        ]
        for answer in ordered[::stride]
    ]


def _bars(steps: Sequence[StepRecord]) -> list[list[float]] | None:
    """Each step, where they are few enough."""
    return [_bar(step) for step in steps] if len(steps) <= MOST_STEPS else None


def _bar(step: StepRecord) -> list[float]:
    """Begin and length in microseconds, whether it decodes, its sequences and its tokens."""
    begin_us, end_us = step.begin_s * 1e6, step.end_s * 1e6
    decodes = int(step.phase == "decode")
    return [round(begin_us, 1), round(end_us - begin_us, 1), decodes, step.seqs, step.tokens]


def _rounded(values_B: np.ndarray, decimals: int = 0) -> list[float]:
    """As numbers that JSON writes short."""
    rounded = np.round(values_B, decimals)
    if decimals:
        return [float(value) for value in rounded]
    return [int(value) for value in rounded]
