"""What prefill pools say that they have written: some of it is read and compared before its use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenspeed_plan.runtime.pools.channel import Message
from tokenspeed_plan.runtime.pools.handover_counts import HandoverCounts
from tokenspeed_plan.runtime.pools.peers import Handover, Peer
from tokenspeed_plan.runtime.pools.pool_ranks import Ranks
from tokenspeed_plan.runtime.scheduling.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class _Arrival:
    """What a peer says that it has written; the ranks read some of it, under a number of theirs."""

    job: int
    peer: Peer
    handover: Handover
    message: Message

    @property
    def is_wanted(self) -> bool:
        """Whether its request was not cancelled."""
        return self.handover.sequence.state != "cancelled"


class Arrivals:
    """Prompts that have come, until they are in the cache.

    Args:
        scheduler: of the decode pool.
        ranks: of the decode pool.
        counts: what came of them.
    """

    def __init__(self, scheduler: Scheduler, ranks: Ranks, counts: HandoverCounts) -> None:
        self._scheduler = scheduler
        self._ranks = ranks
        self._counts = counts
        self._arrivals: list[_Arrival] = []

    def add(self, peer: Peer, handover: Handover, message: Message) -> None:
        """Read some of what has come."""
        reservation = self._scheduler.reservations.held[handover.name]
        job = self._ranks.begin()
        order = {"do": "sample", "job": job, "pages": reservation.new_pages}
        self._ranks.do(order | {"state_slot": reservation.state_slot})
        self._arrivals.append(_Arrival(job, peer, handover, message))

    def use(self, refuse: Callable[[Peer, Handover], None]) -> None:
        """Use what was read, if it is what was ordered.

        Args:
            refuse: is told of what is not.
        """
        for arrival in list(self._arrivals):
            handover = arrival.handover
            digest = self._ranks.result(arrival.job)
            if arrival.is_wanted and digest is None:
                continue
            self._arrivals.remove(arrival)
            self._ranks.forget(arrival.job)
            if not arrival.is_wanted:
                self._scheduler.reservations.drop(handover.name)
                self._scheduler.unblock()
            elif self._is_right(arrival, digest):
                self._use(arrival)
            else:
                self._counts.refused += 1
                refuse(arrival.peer, handover)

    def leave(self) -> list[Handover]:
        """Use none of what is left; returns whose it was."""
        left = [arrival.handover for arrival in self._arrivals]
        self._arrivals = []
        for handover in left:
            self._scheduler.reservations.drop(handover.name)
        return left

    def _is_right(self, arrival: _Arrival, digest: str | None) -> bool:
        """Whether what was read is what was said."""
        reservation = self._scheduler.reservations.held[arrival.handover.name]
        said = (arrival.message.get("num_tokens"), arrival.message.get("digest"))
        return said == (reservation.num_tokens, digest)

    def _use(self, arrival: _Arrival) -> None:
        handover, message, sequence = arrival.handover, arrival.message, arrival.handover.sequence
        self._scheduler.reservations.fulfil(sequence)
        num_tokens, cached = len(sequence.token_ids) - 1, int(message.get("num_cached", 0))
        # Tokens that neither pool had to compute.
        sequence.num_cached_tokens = min(max(cached, handover.num_known), num_tokens)
        self._scheduler.metrics.hit_tokens += sequence.num_cached_tokens
        arrival.peer.learn(sequence.digests)
        self._counts.done += 1
        self._counts.computed_tokens += num_tokens - cached
        self._counts.size_bytes += int(message.get("size_bytes", 0))
        self._counts.returned_tokens += int(message.get("num_returned", 0))
        self._counts.wait_s += self._scheduler.clock() - handover.begun_s
        self._counts.exposed_s += int(message.get("exposed_us", 0)) * 1e-6
        sequence.is_elsewhere = False
