"""One prompt that is computed for another pool, and how far it is handed over.

Whole pages leave as soon as a chunk fills them, layer by layer while it is computed; the rest and
the state with the chunk that ends the prompt. What is under way is held, so that nobody writes over
it. While a state is held the cache cannot give up the pages before it either, so that all of them
count as lent.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field

from tokenspeed_plan.plans.errors import PoolError
from tokenspeed_plan.runtime.cache.held import Held
from tokenspeed_plan.runtime.cache.prefix_cache import Hit, PrefixCache
from tokenspeed_plan.runtime.pools.channel import Message
from tokenspeed_plan.runtime.pools.pool_rank import Move
from tokenspeed_plan.runtime.pools.pool_ranks import Ranks
from tokenspeed_plan.runtime.scheduling.admission import Clock
from tokenspeed_plan.runtime.scheduling.reservations import Reservations
from tokenspeed_plan.runtime.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Order:
    """What a decode pool asks for: the caches after `token_ids`.

    Attributes:
        number: of the order among its own.
        first_page: the first page of the prompt that it does not have.
        pages: where those from there on go.
        state_slot: where the state goes.
    """

    number: int
    token_ids: tuple[int, ...]
    first_page: int
    pages: tuple[int, ...]
    state_slot: int


@dataclass(slots=True, eq=False)
class PrefillJob:
    """An order, and what was sent of it.

    Attributes:
        number: of the hand-over among those of this pool.
        caller: the number of the decode pool.
        name: of its request in the engine.
        clock: of this pool.
        num_cached: tokens that this pool had already.
        num_returned: of these, those that came back with an answer.
        is_sent: whether all of it has left, or leaves with a step that was launched.
        is_computed: whether that step went well.
        is_cancelled: whether nobody wants it any more.
        has_failed: whether it could not be computed.
        size_bytes: that were sent.
        computed_s: when the last token was computed.
    """

    order: Order
    number: int
    caller: int
    name: str
    reservations: Reservations
    ranks: Ranks
    clock: Clock
    num_cached: int = 0
    num_returned: int = 0
    is_sent: bool = False
    is_computed: bool = False
    is_cancelled: bool = False
    has_failed: bool = False
    size_bytes: int = 0
    computed_s: float = 0.0
    _sent: list[int] = field(default_factory=list)  # pages here, from the order's first on
    _held: list[int] = field(default_factory=list)
    _digests: list[bytes] = field(default_factory=list)
    _state_slot: int = 0

    def __post_init__(self) -> None:
        self.reservations.lent[self.name] = self._held

    @property
    def cache(self) -> PrefixCache:
        """Where the prompt is computed."""
        return self.reservations.cache

    @property
    def is_over(self) -> bool:
        """Whether nothing more will be sent."""
        return self.is_computed or self.is_cancelled or self.has_failed

    def match(self) -> Hit:
        """What the cache has of it."""
        token_ids = self.order.token_ids
        self.cache.extend(self._digests, token_ids, len(token_ids))
        return self.cache.match(self._digests, token_ids, len(token_ids))

    def may_send(self, hit: Hit) -> bool:
        """Whether the cache has all of it, and the state there may be held."""
        is_whole = hit.num_tokens == len(self.order.token_ids)
        return is_whole and self.reservations.may_hold_state

    def next_move(self, sequence: Sequence, count: int) -> Move | None:
        """What leaves with a step that computes `count` more tokens of its sequence.

        The state after the last token leaves with it, too, if it may be held.

        Args:
            sequence: that computes it.
            count: of the step.
        """
        end = sequence.num_computed + count
        filled = end // self.cache.page_size
        is_last = end == len(self.order.token_ids) and self.reservations.may_hold_state
        if is_last:
            filled = self.order.first_page + len(self.order.pages)
        pages = sequence.pages[self._next_page : filled]
        if is_last and self.ranks.state_bytes:
            self._hold_state(self.cache.state_slots.share(sequence.own_slots[0]))
            self._hold(sequence.pages[: self._next_page])
        self._hold(pages)
        return self._move(pages, is_last) if pages or is_last else None

    def _hold(self, pages: Seq[int]) -> None:
        self._held += [self.cache.pages.share(page) for page in pages]

    def _hold_state(self, slot: int) -> None:
        self._state_slot = slot
        self.reservations.lent_states.add(self.name)

    def send_all(self, hit: Hit) -> None:
        """Send what is left: all is computed, and lies in the cache; else it has failed."""
        if not self.may_send(hit):
            self.fail()
            return
        held = Held.of(self.cache, hit.checkpoint)
        self._hold_state(held.state_slot)
        self._held += held.pages
        move = self._move(held.pages[self._next_page :], is_last=True)
        self.ranks.do({"do": "push", "move": asdict(move)})
        self.note_computed()

    def note_computed(self) -> None:
        """All of it is computed."""
        self.is_computed = True
        self.computed_s = self.clock()

    def fail(self) -> None:
        """It cannot be computed."""
        self.has_failed = True
        self._stop()

    def cancel(self) -> None:
        """Nobody wants it any more."""
        self.is_cancelled = True
        self._stop()

    def _stop(self) -> None:
        self.ranks.do({"do": "stop", "job": self.number})

    @property
    def _next_page(self) -> int:
        """The first page of the prompt that was not sent, and that the peer does not have."""
        return self.order.first_page + len(self._sent)

    def _move(self, pages: Seq[int], is_last: bool) -> Move:
        """Send pages that are held, and with the last ones the state after them."""
        begin = len(self._sent)
        self._sent += pages
        targets = self.order.pages[begin : len(self._sent)]
        if len(targets) != len(pages):
            raise PoolError(
                f"{len(self.order.pages)} pages are reserved, {len(self._sent)} are computed",
                "start both pools with one bundle",
            )
        self.size_bytes += len(pages) * self.ranks.page_bytes
        self.is_sent = is_last
        if not is_last:
            return Move(self.number, self.caller, list(pages), targets)
        self.size_bytes += self.ranks.state_bytes
        state = (0, 0)
        if self.ranks.state_bytes:
            state = (self._state_slot, self.order.state_slot)
        return Move(self.number, self.caller, list(pages), targets, *state, True, self._sent)

    def report(self, digest: str) -> Message:
        """What the decode pool is told once nothing is under way."""
        name = self.order.number
        if self.is_cancelled:
            return {"type": "cancelled", "id": name}
        if self.has_failed:
            return {"type": "failed", "id": name}
        return {
            "type": "done",
            "id": name,
            "num_tokens": len(self.order.token_ids),
            "num_cached": self.num_cached,
            "num_returned": self.num_returned,
            "size_bytes": self.size_bytes,
            "exposed_us": round((self.clock() - self.computed_s) * 1e6),
            "digest": digest,
        }

    def release(self) -> None:
        """Hold nothing any more; what is under way has arrived, or its route is closed."""
        self.cache.drop_pages(self._held)
        if self._state_slot:
            self.cache.state_slots.drop(self._state_slot)
        self._sent, self._held, self._state_slot = [], [], 0
        del self.reservations.lent[self.name]
        self.reservations.lent_states.discard(self.name)
