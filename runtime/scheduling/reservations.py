"""Memory for prompts that come from elsewhere: taken before they do, and held until they start.

Another pool computes them, or the host has them. A reservation has the pages of a prompt, but for
its last token at least, and a slot for the state there; what the cache knows of it already is
shared. Once all is there it goes into the prefix cache, where its sequence finds it.

So that nobody waits for ever, no reservation may keep a running sequence, or another reservation,
from the pages of its longest answer: whoever has begun can be finished with all others held.
Reservations hold at most as many state slots as the cache has checkpoints, which no sequence needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from tokenspeed_plan.plans.schema import Limits
from tokenspeed_plan.runtime.cache.prefix_cache import PrefixCache
from tokenspeed_plan.runtime.cache.prefix_tree import Node
from tokenspeed_plan.runtime.scheduling.sequence import Sequence


@dataclass(slots=True, eq=False)
class Reservation:
    """What is held for a prompt.

    Attributes:
        num_tokens: of the prompt that will be there.
        pages: of these tokens.
        num_known: of the pages, those that the cache had already.
        state_slot: for the state after them; a mere number where the model has none.
        most_pages: of the sequence at its longest.
    """

    num_tokens: int
    pages: list[int]
    num_known: int
    state_slot: int
    most_pages: int

    @property
    def new_pages(self) -> list[int]:
        """The pages that have to be filled."""
        return self.pages[self.num_known :]


@dataclass(slots=True)
class Reservations:
    """All reservations of a pool.

    Attributes:
        held: by the id of the request.
        abandoned: of requests that do without, which a peer may still write.
        lent: pages that are sent to another pool, or that a state which is sent keeps in the cache,
            by the name of what is sent.
        lent_states: the names of those whose state is sent, too.
    """

    cache: PrefixCache
    limits: Limits
    has_state: bool
    held: dict[str, Reservation] = field(default_factory=dict)
    abandoned: list[Reservation] = field(default_factory=list)
    lent: dict[str, list[int]] = field(default_factory=dict)
    lent_states: set[str] = field(default_factory=set)

    def pages(self, but: str = "") -> set[int]:
        """All pages that are held, but for those of one request."""
        found: set[int] = set()
        for reservation in self._all(but):
            found.update(reservation.pages)
        for name, pages in self.lent.items():
            if name != but:
                found.update(pages)
        return found

    @property
    def may_hold_state(self) -> bool:
        """Whether one more state may be held; running sequences need the cache's others."""
        held = len(self._all()) + len(self.lent_states)
        return not self.has_state or held < self.limits.num_checkpoints

    @property
    def holds_any(self) -> bool:
        """Whether something is held that will be given back."""
        return bool(self.held or self.abandoned or self.lent)

    def _all(self, but: str = "") -> list[Reservation]:
        return [each for name, each in self.held.items() if name != but] + self.abandoned

    def pages_at_most(self, sequence: Sequence) -> int:
        """Pages of a sequence at its longest."""
        return -(-sequence.max_len // self.limits.page_size)

    def can_start(self, sequence: Sequence) -> bool:
        """Whether a sequence can be finished while all reservations of others are held."""
        name = sequence.request.request_id
        return self.pages_at_most(sequence) + len(self.pages(name)) <= len(self.cache.pages)

    def reserve(
        self, sequence: Sequence, running: Iterable[Sequence], num_tokens: int | None = None
    ) -> Reservation | None:
        """Take memory for the first tokens of a prompt; None where there is none now.

        Args:
            sequence: holds no memory.
            running: sequences that do.
            num_tokens: for so many; by default all but the last, which is computed in any case.
        """
        if num_tokens is None:
            num_tokens = len(sequence.token_ids) - 1
        if not self.may_hold_state:
            return None
        self.cache.extend(sequence.digests, sequence.token_ids, num_tokens + 1)
        digests = sequence.digests[: num_tokens // self.limits.page_size]
        nodes = self.cache.path(digests, sequence.token_ids)
        known = [self.cache.pages.share(node.page) for node in nodes[1:]]
        most_pages = self.pages_at_most(sequence)
        reservation = Reservation(num_tokens, known, len(known), 0, most_pages)
        if not self._fits(reservation, running) or not self._take(reservation):
            self._free(reservation)
            return None
        self.held[sequence.request.request_id] = reservation
        return reservation

    def _num_pages(self, reservation: Reservation) -> int:
        return -(-reservation.num_tokens // self.limits.page_size)

    def _fits(self, new: Reservation, running: Iterable[Sequence]) -> bool:
        """Whether all that has begun can be finished, one after the other, with this one held."""
        num_new = self._num_pages(new) - new.num_known
        total = len(self.pages() | set(new.pages)) + num_new
        most = len(self.cache.pages)
        for other in running:
            if self.pages_at_most(other) + total > most:
                return False
        for reservation in self.held.values():
            if reservation.most_pages + total - len(reservation.pages) > most:
                return False
        return new.most_pages + total - self._num_pages(new) <= most

    def _take(self, reservation: Reservation) -> bool:
        num_new = self._num_pages(reservation) - reservation.num_known
        reservation.pages += sorted(self.cache.take_pages(num_new))  # neighbours are pushed as one
        if len(reservation.new_pages) < num_new:
            return False
        reservation.state_slot = self.cache.take_spare_state_slot() or 0
        return reservation.state_slot > 0

    def fulfil(self, sequence: Sequence) -> Node:
        """Enter what was reserved into the cache: all of it is there; returns the checkpoint."""
        reservation = self.held[sequence.request.request_id]
        cache, token_ids, count = self.cache, sequence.token_ids, reservation.num_tokens
        node = cache.add_pages(cache.root, sequence.digests, token_ids, count, reservation.pages)
        return cache.add_checkpoint(
            node, token_ids, count, reservation.state_slot, reservation.pages
        )

    def drop(self, request_id: str) -> None:
        """Give back what is held for a request, if anything."""
        reservation = self.held.pop(request_id, None)
        if reservation is not None:
            self._free(reservation)

    def abandon(self, request_id: str) -> Reservation | None:
        """Keep what a peer may still write from everybody; what the cache had is not needed."""
        reservation = self.held.pop(request_id, None)
        if reservation is not None:
            self.abandoned.append(reservation)
            known = reservation.pages[: reservation.num_known]
            reservation.pages, reservation.num_known = reservation.new_pages, 0
            self.cache.drop_pages(known)
        return reservation

    def settle(self, reservation: Reservation) -> None:
        """Give back what was abandoned: nobody writes it any more."""
        self.abandoned.remove(reservation)
        self._free(reservation)

    def _free(self, reservation: Reservation) -> None:
        if reservation.state_slot:
            self.cache.state_slots.drop(reservation.state_slot)
        self.cache.drop_pages(reservation.pages)
        reservation.pages, reservation.state_slot = [], 0
