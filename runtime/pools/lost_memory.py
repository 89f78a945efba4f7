"""Memory that another pool may still write although nobody waits for it any more.

A pool that says nothing may be frozen, and go on with its copies later. So what was reserved for
it is given to nobody before it says that it has stopped, or is gone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from tokenspeed_plan.runtime.pools.channel import CUT_S
from tokenspeed_plan.runtime.scheduling.reservations import Reservation
from tokenspeed_plan.runtime.scheduling.scheduler import Scheduler

_Key = TypeVar("_Key")
RANKS_END_S = 10.0  # in which the other ranks of a pool end whose first one was killed


def settle_s(transport_s: float, num_ranks: int) -> float:
    """For how long a pool may still write here after its first rank has ended.

    Args:
        transport_s: for how long what was sent may be on its way.
        num_ranks: of that pool. The others carry out what they were told before they notice.
    """
    if num_ranks == 1:
        return transport_s
    return transport_s + RANKS_END_S


@dataclass(frozen=True, slots=True)
class _Late:
    """Memory that is given back at a time."""

    at_s: float
    reservation: Reservation


class LostMemory:
    """What is abandoned, and until when.

    Args:
        scheduler: whose memory it is.
        settle_s: for how long bytes of a process that has ended may still come.
    """

    def __init__(self, scheduler: Scheduler, settle_s: float) -> None:
        self._scheduler = scheduler
        self._settle_s = settle_s
        self._late: list[_Late] = []

    @property
    def num_pages(self) -> int:
        """Pages that nobody uses."""
        return sum(len(each.new_pages) for each in self._scheduler.reservations.abandoned)

    def keep(self, name: str, key: _Key, abandoned: dict[_Key, Reservation]) -> None:
        """Abandon what is reserved under a name, if anything, and note it under a key."""
        reservation = self._scheduler.reservations.abandon(name)
        if reservation is not None:
            abandoned[key] = reservation
        self._scheduler.unblock()

    def settle(self, reservation: Reservation) -> None:
        """Give it back: nobody writes it any more."""
        self._scheduler.reservations.settle(reservation)
        self._scheduler.unblock()

    def end(self, reservations: Iterable[Reservation], ended: bool) -> None:
        """The pool that might write these is lost.

        Args:
            reservations: that are abandoned.
            ended: whether it has closed its connection itself, or its process is gone.
        """
        wait_s = self._settle_s if ended else CUT_S
        for reservation in reservations:
            self._late.append(_Late(time.monotonic() + wait_s, reservation))
        self.settle_late()

    def settle_late(self) -> None:
        """Give back what it is time for."""
        now = time.monotonic()
        for late in [late for late in self._late if late.at_s <= now]:
            self._late.remove(late)
            self.settle(late.reservation)
