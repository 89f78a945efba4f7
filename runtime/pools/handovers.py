"""The decode pool's side: which prompts are computed elsewhere, where, and what comes of them.

A sequence waits in the queue of the scheduler while a prefill pool computes its prompt; decode
steps of others go on. Memory is reserved before a prompt is ordered. What has come is compared and
entered into the prefix cache, where the sequence finds all but its last token. Whatever goes wrong
on the way, another pool computes it, or this one: nothing is lost, and half a hand-over is used by
nobody. Memory that a lost pool may still write is kept until that is over.
"""

from __future__ import annotations

import queue
import sys
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.pools.arrivals import Arrivals
from tokenspeed_plan.runtime.pools.channel import Channel, ChannelClosed, Facts, Message
from tokenspeed_plan.runtime.pools.handover_counts import Gauges, HandoverCounts
from tokenspeed_plan.runtime.pools.lost_memory import LostMemory, settle_s
from tokenspeed_plan.runtime.pools.orders import Orders
from tokenspeed_plan.runtime.pools.peers import Events, Handover, Peer, events_into, nearest
from tokenspeed_plan.runtime.pools.pool_ranks import PoolRanks, Ranks
from tokenspeed_plan.runtime.pools.return_sender import ReturnSender
from tokenspeed_plan.runtime.pools.transport import Transport
from tokenspeed_plan.runtime.scheduling.reservations import Reservation
from tokenspeed_plan.runtime.scheduling.scheduler import Scheduler
from tokenspeed_plan.runtime.scheduling.sequence import Sequence as Progress

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.engine import Engine

_LOOK_S = 0.002  # between two looks at the queue of an engine that has nothing to do
_END_S = 2.0


@dataclass(frozen=True, slots=True)
class PeerOptions:
    """How a decode pool uses its prefill pools.

    Attributes:
        addresses: of them.
        token: that both sides know.
        timeout_s: after which a peer that says nothing gets no more orders.
        start_s: in which a peer must answer at the start.
        retry_s: after which a lost peer is called again.
    """

    addresses: tuple[tuple[str, int], ...]
    token: str
    timeout_s: float = 10.0
    start_s: float = 600.0
    retry_s: float = 1.0


class Handovers:
    """Lets prefill pools compute the prompts of an engine.

    Args:
        scheduler: of the decode pool.
        plan: with both pools.
        ranks: of the decode pool.
        peers: the prefill pools.
        options: how they are used.

    Attributes:
        counts: what came of it.
        lost: memory that lost peers may still write.
    """

    def __init__(
        self, scheduler: Scheduler, plan: Plan, ranks: Ranks, peers: Seq[Peer], options: PeerOptions
    ) -> None:
        self.counts = HandoverCounts()
        self._scheduler = scheduler
        self._reservations = scheduler.reservations
        self._ranks = ranks
        self._options = options
        self._facts = Facts.of(plan, ranks.transport.name)
        prefill = plan.pools[1].limits
        self._max_jobs, self._page_size = prefill.max_seqs, prefill.page_size
        self._orders = Orders(self._page_size, ranks)
        self._peers = peers
        self._waiting: deque[Handover] = deque()
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        late_s = settle_s(ranks.transport.settle_s, plan.pools[1].layout.num_ranks)
        self.lost = LostMemory(scheduler, late_s)
        self._arrivals = Arrivals(scheduler, ranks, self.counts)
        self._returns = ReturnSender(scheduler, ranks, plan, peers, self.counts)

    def start(self) -> int:
        """Connect to the peers; one that cannot be reached is tried again and again.

        Returns:
            How many are there.

        Raises:
            PoolError: one runs another plan, or has another token.
        """
        memory = self._ranks.descriptions
        events = events_into(self._events.put, Events(self._joined, self._said, self._left))
        num_peers = 0
        for peer in self._peers:
            connect = partial(peer.connect, self._options.token, self._facts, memory)
            try:
                connect(self._options.start_s)
                num_peers += 1
            except ChannelClosed as closed:
                print(f"{peer.name} is not there: {closed}", file=sys.stderr)
            peer.watch(partial(connect, self._options.timeout_s), events)
        return num_peers

    @property
    def num_peers(self) -> int:
        """Peers that take orders."""
        return sum(peer.is_usable for peer in self._peers)

    @property
    def num_jobs(self) -> int:
        """Orders on the way."""
        return sum(len(peer.jobs) for peer in self._peers)

    @property
    def is_open(self) -> bool:
        """Whether answers are on their way back."""
        return self._returns.num_open > 0

    @property
    def num_heard(self) -> int:
        """Messages of all peers."""
        return sum(peer.num_heard for peer in self._peers)

    def gauges(self) -> Gauges:
        """What a server shows of hand-overs."""
        return [
            ("prefill_pools", "Prefill pools that take prompts", lambda: self.num_peers),
            ("handovers_in_flight", "Prompts at prefill pools", lambda: self.num_jobs),
            ("answers_in_flight", "Answers on their way back", lambda: self._returns.num_open),
            (
                "kv_pages_abandoned",
                "Pages that a lost prefill pool may still write",
                lambda: self.lost.num_pages,
            ),
            *self.counts.gauges(),
        ]

    def offer(self, sequence: Progress) -> None:
        """Let a peer compute the prompt of a sequence, if that saves this pool a page or more."""
        self._handle_events(0.0)
        if not self.num_peers or sequence.is_scored:  # whose prompt is computed here in any case
            return
        cache, token_ids = self._scheduler.cache, sequence.token_ids
        num_tokens = len(token_ids) - 1
        cache.extend(sequence.digests, token_ids, len(token_ids))
        hit = cache.match(sequence.digests, token_ids, num_tokens)
        if num_tokens - hit.num_tokens < self._page_size:
            return
        sequence.is_elsewhere = True
        self._waiting.append(Handover(sequence))

    def poll(self, is_busy: bool) -> None:
        """Handle what came, and order what waits."""
        wait_s = 0.0
        has_news = bool(self._scheduler.waiting) or self.is_open
        if not is_busy and has_news and not can_step(self._scheduler):
            wait_s = _LOOK_S
        self._handle_events(wait_s)
        self._arrivals.use(self._try_again)
        self._look_after_peers()
        self._order_waiting()
        self._orders.post(self._peers)

    def _handle_events(self, wait_s: float) -> None:
        with suppress(queue.Empty):
            self._events.get(block=wait_s > 0, timeout=wait_s or None)()
            while True:
                self._events.get_nowait()()

    def close(self) -> None:
        """Order nothing more; what was ordered is computed here."""
        self._returns.close(_END_S)
        for peer in self._peers:
            peer.stop(_END_S)
        self._handle_events(0.0)  # of those that have hung up, too: they write no more
        for peer in self._peers:
            while peer.jobs:
                self._go_alone(peer.jobs.popitem()[1])
        for handover in self._arrivals.leave():
            self._go_alone(handover)
        while self._waiting:
            self._go_alone(self._waiting.popleft())

    def _order_waiting(self) -> None:
        """Order the prompts that wait, in their order; some wait for the answer before them."""
        late = [each for each in self._waiting if self._returns.holds_up(each.sequence)]
        for each in late:
            self._waiting.remove(each)
        self._order_ready()
        self._waiting.extendleft(reversed(late))

    def _order_ready(self) -> None:
        while self._waiting:
            handover = self._waiting[0]
            if handover.sequence.state == "cancelled":
                self._waiting.popleft()
                continue
            usable = [peer for peer in self._peers if peer.is_usable]
            usable = [peer for peer in usable if peer.name not in handover.tried]
            if not usable:
                self._go_alone(self._waiting.popleft())
                continue
            free = [peer for peer in usable if len(peer.jobs) < self._max_jobs]
            if not free or self._scheduler.is_blocked:
                return
            running = self._scheduler.running
            reservation = self._reservations.reserve(handover.sequence, running)
            if reservation is None:
                if running or self._reservations.holds_any:
                    return
                self._go_alone(self._waiting.popleft())  # it fits only without the last hit
                continue
            self._waiting.popleft()
            peer = nearest(free, handover.sequence.digests, self._page_size)
            self._order(handover, peer, reservation)

    def _order(self, handover: Handover, peer: Peer, reservation: Reservation) -> None:
        sequence = handover.sequence
        now = self._scheduler.clock()
        sequence.started_s = sequence.started_s or now
        handover.begun_s = now
        handover.order = self.counts.ordered
        self._orders.write(handover, reservation)
        peer.jobs[handover.order] = handover
        self.counts.ordered += 1

    def _joined(self, peer: Peer, channel: Channel) -> None:
        peer.link, peer.is_silent = channel, False
        peer.heard_s = time.monotonic()

    def _said(self, peer: Peer, message: Message) -> None:
        peer.is_silent = False
        kind, order = message.get("type"), message.get("id", -1)
        if self._returns.hear(peer, message) or not isinstance(order, int):
            return
        if kind == "done" and order in peer.jobs:
            self._arrivals.add(peer, peer.jobs.pop(order), message)
            self._arrivals.use(self._try_again)
        elif kind == "failed" and order in peer.jobs:
            self.counts.failed += 1
            self._try_again(peer, peer.jobs.pop(order))
        elif kind in ("cancelled", "done", "failed") and order in peer.abandoned:
            self.lost.settle(peer.abandoned.pop(order))
        elif kind == "error":
            print(f"{peer.name} says: {message.get('reason')!s:.200}", file=sys.stderr)

    def _try_again(self, peer: Peer, handover: Handover) -> None:
        """Ask another peer, or nobody; nothing is written for it any more."""
        self._reservations.drop(handover.name)
        self._scheduler.unblock()
        handover.tried.add(peer.name)
        self._waiting.appendleft(handover)

    def _go_alone(self, handover: Handover) -> None:
        """Compute a prompt here."""
        self._reservations.abandon(handover.name)
        handover.sequence.is_elsewhere = False
        self._scheduler.unblock()
        self.counts.alone += 1

    def _left(self, peer: Peer, ended: bool) -> None:
        """A peer is lost; if it has ended, it writes no more, but for what is on its way."""
        peer.link = None
        self._give_up(peer)
        self.lost.end(peer.abandoned.values(), ended)
        peer.abandoned.clear()
        self._returns.leave(peer)

    def _give_up(self, peer: Peer) -> None:
        """Let others compute all that a peer was to compute."""
        for handover in reversed(list(peer.jobs.values())):
            self.counts.lost += 1
            self.lost.keep(handover.name, handover.order, peer.abandoned)
            handover.tried.add(peer.name)
            self._waiting.appendleft(handover)
        peer.jobs.clear()

    def _look_after_peers(self) -> None:
        """Notice peers that say nothing, and orders that nobody wants any more."""
        now = time.monotonic()
        for peer in self._peers:
            for order, handover in list(peer.jobs.items()):
                if handover.sequence.state == "cancelled":
                    del peer.jobs[order]
                    self.lost.keep(handover.name, order, peer.abandoned)
                    peer.post({"type": "cancel", "id": order})
            if peer.is_usable and now - peer.heard_s > self._options.timeout_s:
                peer.is_silent = True
                orders = list(peer.jobs)
                self._give_up(peer)
                for order in orders:
                    peer.post({"type": "cancel", "id": order})
        self.lost.settle_late()
        self._returns.advance()


def make_handovers(
    engine: Engine, plan: Plan, transport: Transport, options: PeerOptions
) -> Handovers:
    """The hand-overs of an engine of the decode pool.

    Args:
        engine: of that pool.
        plan: with both pools.
        transport: by which prefill pools write here.
        options: who they are.
    """
    ranks = PoolRanks(plan, engine.executor.memory, transport)
    most = plan.pools[1].limits.num_pages
    peers = [Peer(address, most, options.retry_s) for address in options.addresses]
    return Handovers(engine.scheduler, plan, ranks, peers, options)


def can_step(scheduler: Scheduler) -> bool:
    """Whether some sequence waits for nothing but the next step."""
    return bool(scheduler.running) or any(not each.is_elsewhere for each in scheduler.waiting)
