"""What prefill pools say that they have written: some of it is read and compared before its use."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from tokenspeed_plan.runtime.pools.channel import Message
from tokenspeed_plan.runtime.pools.handover_counts import HandoverCounts
from tokenspeed_plan.runtime.pools.peers import Handover, Peer
from tokenspeed_plan.runtime.pools.pool_memory import PoolMemory
from tokenspeed_plan.runtime.pools.samples import Sample
from tokenspeed_plan.runtime.scheduling.reservations import Reservation
from tokenspeed_plan.runtime.scheduling.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class _Arrival:
    """What a peer says that it has written, and some of it as it is read here."""

    peer: Peer
    handover: Handover
    message: Message
    sample: Sample

    @property
    def is_wanted(self) -> bool:
        """Whether its request was not cancelled."""
        return self.handover.sequence.state != "cancelled"

    def is_right(self, reservation: Reservation) -> bool:
        """Whether what was read is what was said."""
        said = (self.message.get("num_tokens"), self.message.get("digest"))
        return said == (reservation.num_tokens, self.sample.digest())


class Arrivals:
    """Prompts that have come, until they are in the cache.

    Args:
        scheduler: of the decode pool.
        counts: what came of them.
    """

    def __init__(self, scheduler: Scheduler, counts: HandoverCounts) -> None:
        self._scheduler = scheduler
        self._counts = counts
        self._arrivals: list[_Arrival] = []

    def add(self, peer: Peer, handover: Handover, message: Message, memory: PoolMemory) -> None:
        """Read some of what has come."""
        reservation = self._scheduler.reservations.held[handover.name]
        sample = memory.sampler.take(reservation.new_pages, reservation.state_slot)
        self._arrivals.append(_Arrival(peer, handover, message, sample))

    def use(self, refuse: Callable[[Peer, Handover], None]) -> None:
        """Use what was read, if it is what was ordered.

        Args:
            refuse: is told of what is not.
        """
        for arrival in list(self._arrivals):
            if arrival.is_wanted and not arrival.sample.is_ready:
                continue
            self._arrivals.remove(arrival)
            name = arrival.handover.name
            if not arrival.is_wanted:
                self._scheduler.reservations.drop(name)
                self._scheduler.unblock()
            elif arrival.is_right(self._scheduler.reservations.held[name]):
                self._use(arrival)
            else:
                self._counts.refused += 1
                refuse(arrival.peer, arrival.handover)

    def leave(self) -> list[Handover]:
        """Use none of what is left; returns whose it was."""
        left = [arrival.handover for arrival in self._arrivals]
        self._arrivals = []
        return left

    def _use(self, arrival: _Arrival) -> None:
        handover, message, sequence = arrival.handover, arrival.message, arrival.handover.sequence
        self._scheduler.reservations.fulfil(sequence)
        # Tokens that neither pool had to compute.
        cached = max(int(message.get("num_cached", 0)), handover.num_known)
        sequence.num_cached_tokens = min(cached, len(sequence.token_ids) - 1)
        self._scheduler.metrics.hit_tokens += sequence.num_cached_tokens
        arrival.peer.learn(sequence.digests)
        self._counts.done += 1
        self._counts.size_bytes += int(message.get("size_bytes", 0))
        self._counts.wait_s += time.perf_counter() - handover.begun_s
        self._counts.exposed_s += int(message.get("exposed_us", 0)) * 1e-6
        sequence.is_elsewhere = False
