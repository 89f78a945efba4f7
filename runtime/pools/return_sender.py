"""The decode pool's side of answers that go back, so that the next turn finds them at its peer.

Where an answer ends, the prefill pool that knows most of it is offered its tokens. If it wants them
it says where to; then what it lacks of the pages is pushed there, with the state at the end.
Nothing is held before that: where the cache has given the end up meanwhile, the offer is dropped.
Nobody waits for an answer but its own next turn, and that no longer than computing it would take.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass

from tokenspeed_plan.plans.errors import PoolError
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.cache.held import Held
from tokenspeed_plan.runtime.cache.prefix_tree import Node
from tokenspeed_plan.runtime.pools.channel import Channel, Message, packed
from tokenspeed_plan.runtime.pools.handover_counts import HandoverCounts
from tokenspeed_plan.runtime.pools.peers import Peer
from tokenspeed_plan.runtime.pools.pool_rank import Move
from tokenspeed_plan.runtime.pools.pool_ranks import Ranks
from tokenspeed_plan.runtime.scheduling.scheduler import Scheduler
from tokenspeed_plan.runtime.scheduling.sequence import Sequence

_SILENCE_S = 10.0  # an answer of which nothing is heard for so long is forgotten
_HOLD_S = 0.1  # for which an answer that is being sent keeps its memory from those who wait
_LOOK_S = 0.0005


@dataclass(frozen=True, slots=True)
class _Room:
    """Where an answer goes: to these pages, from the first one on that is lacking, and a slot."""

    first_page: int
    pages: tuple[int, ...]
    state_slot: int


@dataclass(slots=True, eq=False)
class _Return:
    """An answer that goes back.

    Attributes:
        number: among those of this pool.
        peer: who gets it. route: by which its memory was open then.
        sequence: has its tokens. digests: of its whole pages.
        checkpoint: where it ends.
        patience_s: for how long its next turn waits for it.
        begun_s: when it was offered. heard_s: when its peer said something of it.
        room: where it goes, until it is sent.
        held: what is being sent, unless that was given back. job: the number by which the ranks do
            so; 0 where none is.
        size_bytes: that were sent.
    """

    number: int
    peer: Peer
    route: int
    sequence: Sequence
    digests: Seq[bytes]
    checkpoint: Node
    patience_s: float
    begun_s: float
    heard_s: float
    room: _Room | None = None
    held: Held | None = None
    job: int = 0
    size_bytes: int = 0

    @property
    def name(self) -> str:
        """Of what is lent for it."""
        return f"answer {self.number}"

    @property
    def has_route(self) -> bool:
        """Whether its peer is still the one that it was offered to."""
        return self.peer.route == self.route

    def begins(self, sequence: Sequence) -> bool:
        """Whether a sequence goes on from its end."""
        num_pages, end = len(self.digests), self.checkpoint.position
        if not num_pages or end >= len(sequence.token_ids):
            return False
        if sequence.digests[num_pages - 1 : num_pages] != [self.digests[-1]]:
            return False
        begin = end - len(self.checkpoint.token_ids)
        return sequence.token_ids[begin:end] == self.sequence.token_ids[begin:end]


class ReturnSender:
    """Answers of a decode pool on their way to prefill pools; none where the plan keeps them.

    Args:
        scheduler: of the decode pool.
        ranks: of the decode pool.
        plan: with both pools.
        peers: the prefill pools.
        counts: what came of them.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        ranks: Ranks,
        plan: Plan,
        peers: Seq[Peer],
        counts: HandoverCounts,
    ) -> None:
        self._planned = plan.pools[1].answer_returns
        self._limits = plan.pools[1].limits
        self._scheduler = scheduler
        self._reservations = scheduler.reservations
        self._ranks = ranks
        self._peers = peers
        self._counts = counts
        self._open: dict[int, _Return] = {}
        self._numbers, self._routes = itertools.count(1), itertools.count(1)
        # routes that are closed once nothing is sent by them, with a link that is left then
        self._leaving: dict[int, Channel | None] = {}
        if self._planned is not None:
            scheduler.tell_ends(self._offer)

    @property
    def num_open(self) -> int:
        """Answers on their way."""
        return len(self._open)

    def holds_up(self, sequence: Sequence) -> bool:
        """Whether a prompt should wait for the answer that it goes on from."""
        now = self._scheduler.clock()
        return any(
            now - each.begun_s < each.patience_s and each.has_route and each.begins(sequence)
            for each in self._open.values()
        )

    def _offer(self, checkpoint: Node, sequence: Sequence) -> None:
        """Offer the answer that has just ended to the peer that knows most of it."""
        planned, size = self._planned, self._limits.page_size
        assert planned is not None, "nobody tells of ends where the plan keeps answers"
        digests = sequence.digests[: checkpoint.position // size]
        peers = [peer for peer in self._peers if peer.is_usable and peer.route]
        if not peers or not checkpoint.state_slot:
            return
        peer = max(peers, key=lambda each: each.num_known(digests))
        saved_tokens = checkpoint.position - peer.num_known(digests) * size
        if saved_tokens < planned.least_tokens:
            return
        if sum(each.peer is peer for each in self._open.values()) >= planned.slots:
            self._counts.dropped += 1
            return
        number, now = next(self._numbers), self._scheduler.clock()
        patience_s = saved_tokens * planned.token_us * 1e-6
        self._open[number] = _Return(
            number, peer, peer.route, sequence, digests, checkpoint, patience_s, now, now
        )
        self._counts.offered += 1
        token_ids = packed(sequence.token_ids[: checkpoint.position])
        peer.post({"type": "return", "id": number, "token_ids": token_ids})

    def hear(self, peer: Peer, message: Message) -> bool:
        """Take a message that is about answers; False for another one."""
        kind = message.get("type")
        if kind == "memory":
            self._reach(peer, message)
        elif kind in ("room", "no_room", "kept"):
            try:
                self._take(peer, int(message["id"]), message)
            except (KeyError, TypeError, ValueError) as error:
                print(f"{peer.name} is left: {error!r:.200}", file=sys.stderr)
                peer.hang_up()
        else:
            return False
        return True

    def _reach(self, peer: Peer, message: Message) -> None:
        """Open the memory of a peer's ranks."""
        route = next(self._routes)
        try:
            self._ranks.do({"do": "open", "caller": route, "memory": message["memory"]})
        except (PoolError, KeyError, TypeError) as error:
            reason = getattr(error, "message", repr(error))
            print(f"no answers go back to {peer.name}: {reason:.200}", file=sys.stderr)
            return
        peer.route = route

    def _take(self, peer: Peer, number: int, message: Message) -> None:
        """Hear what a peer says of an answer."""
        each, kind = self._open.get(number), message["type"]
        if each is None or each.peer is not peer or not each.has_route:
            if kind == "room":  # too late
                peer.post({"type": "dropped", "id": number})
        elif kind == "room":
            each.heard_s = self._scheduler.clock()
            each.room = self._room(message)
        else:
            del self._open[number]
            self._count(each, message)

    def _room(self, message: Message) -> _Room:
        """Where a peer wants an answer.

        Raises:
            KeyError, TypeError, ValueError: that is no place.
        """
        pages, slot = tuple(map(int, message["pages"])), int(message["slot"])
        first_page, limits = int(message["first_page"]), self._limits
        if first_page < 0 or not all(0 <= page < limits.num_pages for page in pages):
            raise ValueError("an answer goes to a page that there is not")
        if self._ranks.state_bytes and not 0 < slot < limits.pad_state_slot:
            raise ValueError("an answer goes to a state slot that there is not")
        return _Room(first_page, pages, slot)

    def _count(self, each: _Return, message: Message) -> None:
        """Count an answer of which nothing more comes, and note what its peer knows by it."""
        is_known, is_right = message.get("is_known"), message.get("is_right")
        if is_known or is_right:
            each.peer.learn(each.digests)
        self._counts.known += is_known is True
        self._counts.returned += is_right is True
        self._counts.unwanted += not is_known and not is_right
        if is_right:
            self._counts.returned_bytes += each.size_bytes

    def advance(self) -> None:
        """Send what has a place, one answer at a time, and look after those that are sent."""
        ready = next((each for each in self._open.values() if each.room is not None), None)
        if ready is not None:
            self._send(ready)
        now = self._scheduler.clock()
        for each in list(self._open.values()):
            if each.job:
                self._look_at(each)
            elif now - each.heard_s > _SILENCE_S:
                self._give_up(each)
        busy = {each.route for each in self._open.values() if each.job}
        for route in self._leaving.keys() - busy:
            link = self._leaving.pop(route)
            self._ranks.do({"do": "close", "caller": route})
            if link is not None:
                link.hang_up()

    def _send(self, each: _Return) -> None:
        """Begin to send an answer, if it is still there."""
        room, each.room = each.room, None
        assert room is not None, "only such answers are sent"
        num_pages = -(-each.checkpoint.position // self._limits.page_size)
        fits = room.first_page + len(room.pages) == num_pages and not self._ranks.is_full
        if not (each.checkpoint.state_slot and self._reservations.may_hold_state and fits):
            self._drop(each)
            return
        held = Held.of(self._scheduler.cache, each.checkpoint)
        pages = held.pages[room.first_page :]
        self._reservations.lent[each.name] = held.pages
        self._reservations.lent_states.add(each.name)
        each.held, each.job = held, self._ranks.begin()
        each.size_bytes = len(pages) * self._ranks.page_bytes + self._ranks.state_bytes
        state = (0, 0)
        if self._ranks.state_bytes:
            state = (held.state_slot, room.state_slot)
        move = Move(each.job, each.route, pages, room.pages, *state, True)
        self._ranks.do({"do": "push", "move": asdict(move)})

    def _look_at(self, each: _Return) -> None:
        """Tell its peer once an answer is written; a link that is broken is left.

        Where others wait for its memory for too long it is given back. Then something else may have
        been sent, and nobody may use it.
        """
        try:
            digest = self._ranks.result(each.job)
        except PoolError as error:
            print(f"{each.peer.name} is lost: {error.message}", file=sys.stderr)
            if each.has_route:
                self._leaving[each.route] = each.peer.link
                each.peer.route = 0
            self._end(each)
            self._give_up(each)
            return
        now = self._scheduler.clock()
        if digest is None:
            if self._scheduler.waiting and now - each.heard_s > _HOLD_S:
                self._let_go(each)
            return
        is_whole, each.heard_s = each.held is not None, now
        self._end(each)
        if not each.has_route:
            self._give_up(each)
        elif is_whole:
            each.peer.post({"type": "returned", "id": each.number, "digest": digest})
        else:
            self._drop(each)

    def _end(self, each: _Return) -> None:
        """Nothing is sent of an answer any more."""
        self._let_go(each)
        if each.job:
            self._ranks.forget(each.job)
        each.job = 0

    def _let_go(self, each: _Return) -> None:
        """Hold nothing of an answer any more."""
        if each.held is not None:
            each.held.drop()
            each.held = None
            del self._reservations.lent[each.name]
            self._reservations.lent_states.discard(each.name)
            self._scheduler.unblock()

    def _drop(self, each: _Return) -> None:
        """Tell its peer that nothing is written of an answer."""
        each.peer.post({"type": "dropped", "id": each.number})
        self._give_up(each)

    def _give_up(self, each: _Return) -> None:
        del self._open[each.number]
        self._counts.dropped += 1

    def leave(self, peer: Peer) -> None:
        """A peer is lost; what is being sent to it is held until that is over."""
        if peer.route:
            self._leaving[peer.route] = None
        peer.route = 0
        for each in list(self._open.values()):
            if each.peer is peer and not each.job:
                self._give_up(each)

    def close(self, timeout_s: float) -> None:
        """Offer nothing more, and wait for what is being sent: then nothing is written any more."""
        self._scheduler.tell_ends(lambda checkpoint, sequence: None)
        until = time.monotonic() + timeout_s
        for each in self._open.values():
            each.room = None
        while any(each.job for each in self._open.values()) and time.monotonic() < until:
            self.advance()
            time.sleep(_LOOK_S)
        for each in list(self._open.values()):
            self._end(each)
            self._give_up(each)
