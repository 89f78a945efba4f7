"""A load over time in bins: against the same reckoned request by request and step by step."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from drafting import plan_of
from hypothesis import given
from hypothesis import strategies as st

from tokenspeed_plan.runtime.scheduling.scheduler import Scheduler
from tokenspeed_plan.runtime.simulation import load_series
from tokenspeed_plan.runtime.simulation.load import Turns, Users
from tokenspeed_plan.runtime.simulation.load_results import Answered
from tokenspeed_plan.runtime.simulation.load_run import simulate
from tokenspeed_plan.runtime.simulation.load_series import PageLooks, series
from tokenspeed_plan.runtime.simulation.virtual_steps import StepRecord

BINS = 12


class Times:
    """A token of a prompt takes 1 ms, a decode step 0.1 ms."""

    def prefill_us(self, tokens: int, seqs: int, context: float) -> float:
        return 1000.0 * tokens

    def decode_us(self, bucket: int, seqs: int, context: float) -> float:
        return 100.0

    def host_us(self, seqs: int, prompts: int) -> float:
        return 0.0


def users(talks: int = 30) -> Users:
    """Four users with conversations of two turns, of other lengths each."""
    made = [
        Turns(1 + 37 * number % 183, 3, (1 + 5 * number % 17, 1 + 7 * number % 17))
        for number in range(talks)
    ]
    return Users(made, 4, vocab_size=300)


Lengths = st.floats(0.0, 3.0, allow_subnormal=False).map(lambda length: round(length, 3))


def overlap(begin: float, end: float, low: float, high: float) -> float:
    return max(min(end, high) - max(begin, low), 0.0)


@given(st.lists(st.tuples(Lengths, Lengths, st.booleans(), st.integers(1, 64)), min_size=1))
def test_steps_fill_the_bins_that_they_are_in(
    rows: list[tuple[float, float, bool, int]],
) -> None:
    steps, now = list[StepRecord](), 0.0
    for pause, length, decodes, seqs in rows:
        phase = "decode" if decodes else "prefill"
        steps.append(StepRecord(phase, 8, seqs, seqs, now + pause, now + pause + length))
        now += pause + length
    edges = np.linspace(0.0, max(now, 1.0), BINS + 1)
    found = load_series._step_bins(steps, edges)
    for at, (low, high) in enumerate(itertools.pairwise(edges)):
        time = {"prefill": 0.0, "decode": 0.0}
        seqs_s = 0.0
        for step in steps:
            own = overlap(step.begin_s, step.end_s, low, high)
            time[step.phase] += own
            seqs_s += own * step.seqs * (step.phase == "decode")
        for phase, seconds in time.items():
            assert found[phase][at] == pytest.approx(1e3 * seconds / (high - low), abs=0.51)
        if time["decode"] / (high - low) > 1e-5:
            assert found["batch"][at] == pytest.approx(seqs_s / time["decode"], abs=0.06)


@given(st.lists(st.tuples(Lengths, Lengths), min_size=1, max_size=40))
def test_levels_are_those_of_all_that_are_there(spans: list[tuple[float, float]]) -> None:
    begins = np.array([begin for begin, _ in spans])
    ends = np.array([begin + length for begin, length in spans])
    edges = np.linspace(0.0, max(float(ends.max()), 1.0), BINS + 1)
    means, most = load_series._levels(begins, ends, edges)
    for at, (low, high) in enumerate(itertools.pairwise(edges)):
        area = sum(overlap(b, e, low, high) for b, e in zip(begins, ends, strict=True))
        assert means[at] == pytest.approx(area / (high - low), abs=1e-6)
        last = at == BINS - 1
        moments = [low, *(b for b in begins if low <= b < high or (last and b == high))]
        seen = [sum(b <= t < e for b, e in zip(begins, ends, strict=True)) for t in moments]
        assert most[at] == max(seen)


def answer(number: int) -> Answered:
    return Answered(float(number), 0.0, 0.5, 1.0, 100, number % 100, 1 + number % 3)


def test_many_requests_are_thinned_out() -> None:
    few = load_series._dots([answer(number) for number in range(30)])
    assert len(few) == 30 and few[0] == [0.0, 500.0, None] and few[2] == [2.0, 500.0, 500.0]
    many = load_series._dots([answer(number) for number in range(50_001)])
    assert 10_000 < len(many) <= load_series.MOST_REQUESTS
    assert many[1][0] == 3.0


def test_pages_are_those_that_the_cache_counts(checkpoint: Any) -> None:
    """Shared ones once; and looking changes nothing."""
    plan = plan_of(checkpoint("moe"), 0)
    looks, counted = PageLooks(), list[tuple[int, int]]()

    def look(scheduler: Scheduler) -> None:
        looks(scheduler)
        cache = scheduler.cache
        kept = len(cache.pages) - cache.pages.num_free - cache.pages_in_use
        counted.append((cache.pages_in_use, kept))

    found = simulate(plan, Times(), users(), look=look)
    assert [(held, kept) for _, held, kept in looks.looks.values] == counted
    assert max(held for held, _ in counted) > 4 and max(kept for _, kept in counted) > 0
    alone = simulate(plan, Times(), users())
    assert (found.answers, found.steps) == (alone.answers, alone.steps)


def test_a_long_load_is_drawn_from_bins_alone(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(checkpoint("moe"), 0)
    found = simulate(plan, Times(), users())
    whole = series(found, PageLooks(), plan.pool.limits.num_pages)
    assert len(whole["steps"]) == len(found.steps)
    assert {len(values) for values in whole["bins"].values()} == {load_series.BINS}
    assert sum(whole["bins"]["prompt_tokens"]) == sum(a.prompt_tokens for a in found.answers)
    monkeypatch.setattr(load_series, "MOST_STEPS", len(found.steps) - 1)
    assert series(found, PageLooks(), 1)["steps"] is None


def test_the_looks_stay_few() -> None:
    looks = PageLooks()

    class Slots:
        num_free = 3

        def __len__(self) -> int:
            return 9

    running = (SimpleNamespace(pages=[1, 2]), SimpleNamespace(pages=[2, 4]))
    scheduler: Any = SimpleNamespace(
        running=running, cache=SimpleNamespace(pages=Slots()), clock=lambda: 0.5
    )
    for _ in range(10_000):
        looks(scheduler)
    assert len(looks.looks.values) <= load_series.LOOKS
    assert looks.looks.values[0] == (0.5, 3, 3)
