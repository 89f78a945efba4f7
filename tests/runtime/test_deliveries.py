"""Items of a thread come to the loop in rounds, with rests between them; the clock is a double."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tokenspeed_plan.runtime.serving.deliveries import LONGEST_REST_S, REST, Deliveries


class Loop:
    """Runs what it is told when the test says so."""

    def __init__(self) -> None:
        self.ready: list[Callable[[], object]] = []
        self.later: list[tuple[float, Callable[[], object]]] = []

    def call_soon(self, work: Callable[..., object], *args: object) -> None:
        self.ready.append(lambda: work(*args))

    call_soon_threadsafe = call_soon

    def call_later(self, delay_s: float, work: Callable[[], object]) -> None:
        self.later.append((delay_s, work))

    def turn(self) -> None:
        ready, self.ready = self.ready, []
        for work in ready:
            work()

    def sleep(self) -> float:
        """Until the next timer; returns how long."""
        ((delay_s, work),) = self.later
        self.later.clear()
        work()
        return delay_s


@pytest.fixture
def worked_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What each look at the clock of the thread shows."""
    shown: list[float] = []
    monkeypatch.setattr(time, "thread_time", lambda: shown.pop(0))
    return shown


def test_rounds_and_rests(worked_s: list[float]) -> None:
    loop, rounds = Loop(), list[Any]()
    deliveries = Deliveries[str](loop, rounds.append)  # type: ignore[arg-type]
    deliveries.put("a")
    deliveries.put("b")
    assert len(loop.ready) == 1, "the loop is woken once"
    worked_s += [1.0, 1.002]
    loop.turn()
    deliveries.put("c")
    loop.turn()
    deliveries.put("d")
    assert rounds == [["a", "b"]] and not loop.ready, "it rests"
    worked_s += [2.0, 3.0]
    assert loop.sleep() == pytest.approx(REST * 0.002)
    assert rounds == [["a", "b"], ["c", "d"]]
    loop.turn()
    assert loop.sleep() == LONGEST_REST_S
    assert not loop.ready and not loop.later, "there is nothing to do"
    deliveries.put("e")
    worked_s += [3.0]
    loop.turn()
    assert rounds[2:] == [["e"]]


def test_an_error_of_a_reader_ends_no_rounds(worked_s: list[float]) -> None:
    found: list[str] = []

    def deliver(items: list[str]) -> None:
        found.extend(items)
        raise ValueError("of a reader")

    loop = Loop()
    deliveries = Deliveries[str](loop, deliver)  # type: ignore[arg-type]
    deliveries.put("a")
    worked_s += [0.0, 0.0, 0.0]
    with pytest.raises(ValueError):
        loop.turn()
    deliveries.put("b")
    loop.turn()
    with pytest.raises(ValueError):
        loop.sleep()
    assert found == ["a", "b"]
