"""One prompt that is computed for another pool, and how far it is handed over.

Whole pages leave as soon as a chunk has filled them, while the next one is computed; the rest and
the state after the last token when all is computed. What is under way is held, so that nobody
writes over it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from tokenspeed_plan.plans.errors import PoolError
from tokenspeed_plan.runtime.cache.prefix_cache import Hit, PrefixCache
from tokenspeed_plan.runtime.pools.blocks import Copies
from tokenspeed_plan.runtime.pools.channel import Message
from tokenspeed_plan.runtime.pools.pool_memory import PoolMemory
from tokenspeed_plan.runtime.pools.samples import Sample
from tokenspeed_plan.runtime.pools.transport import Pending, Route
from tokenspeed_plan.runtime.scheduling.reservations import Reservations
from tokenspeed_plan.runtime.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Order:
    """What a decode pool asks for: the caches after `token_ids`.

    Attributes:
        first_page: the first page of the prompt that it does not have.
        pages: where those from there on go.
        state_slot: where the state goes.
    """

    request_id: str
    token_ids: tuple[int, ...]
    first_page: int
    pages: tuple[int, ...]
    state_slot: int


@dataclass(slots=True, eq=False)
class PrefillJob:
    """An order, and what was sent of it.

    Attributes:
        name: of its request in the engine.
        num_cached: tokens that this pool had already.
        is_computed: whether all of it is computed, and the rest is under way.
        is_cancelled: whether nobody wants it any more.
        has_failed: whether it could not be computed.
        size_bytes: that were sent.
        computed_s: when the last token was computed.
    """

    order: Order
    name: str
    reservations: Reservations
    memory: PoolMemory
    route: Route
    num_cached: int = 0
    is_computed: bool = False
    is_cancelled: bool = False
    has_failed: bool = False
    size_bytes: int = 0
    computed_s: float = 0.0
    _sent: list[int] = field(default_factory=list)  # pages here, from the order's first on
    _digests: list[bytes] = field(default_factory=list)
    _state_slot: int = 0
    _pending: list[Pending] = field(default_factory=list)
    _sample: Sample | None = None

    def __post_init__(self) -> None:
        self.reservations.lent[self.name] = self._sent

    @property
    def cache(self) -> PrefixCache:
        """Where the prompt is computed."""
        return self.reservations.cache

    @property
    def holds_state(self) -> bool:
        """Whether it holds a state slot."""
        return self._state_slot > 0

    def find(self) -> Hit | None:
        """What the cache has, where that is all of it."""
        token_ids = self.order.token_ids
        self.cache.extend(self._digests, token_ids, len(token_ids))
        hit = self.cache.match(self._digests, token_ids, len(token_ids))
        return hit if hit.num_tokens == len(token_ids) else None

    def send_filled(self, sequence: Sequence) -> None:
        """Send the whole pages that were computed since the last time."""
        filled = sequence.num_computed // self.cache.page_size
        first = self.order.first_page + len(self._sent)
        self._send([self.cache.pages.share(page) for page in sequence.pages[first:filled]])

    def send_rest(self, hit: Hit | None) -> None:
        """Send what is left: all is computed, and lies in the cache; else it has failed."""
        if hit is None:
            self.has_failed = True
            return
        self.computed_s = time.perf_counter()
        node, pages = self.cache.use(hit)
        self._state_slot = hit.checkpoint.state_slot
        if hit.checkpoint is not node:
            pages.append(self.cache.pages.share(hit.checkpoint.page))
        first = self.order.first_page + len(self._sent)
        for page in pages[:first]:
            self.cache.pages.drop(page)
        self._send(pages[first:], self._state_slot)
        self._sample = self.memory.sampler.take(self._sent, self._state_slot)
        self.is_computed = True

    def _send(self, pages: Seq[int], state_slot: int = 0) -> None:
        """Push pages that are held, and the state after them."""
        begin = len(self._sent)
        self._sent += pages
        targets = self.order.pages[begin : len(self._sent)]
        if len(targets) != len(pages):
            raise PoolError(
                f"{len(self.order.pages)} pages are reserved, {len(self._sent)} are computed",
                "start both pools with one bundle",
            )
        parts: list[Copies] = []
        if pages:
            parts.append(self.memory.page_copies(pages, targets))
        if state_slot and self.memory.has_state:
            parts.append(self.memory.state_copies(state_slot, self.order.state_slot))
        if parts:
            self.size_bytes += sum(part.size_bytes for part in parts)
            self._pending.append(self.route.push(parts))

    @property
    def has_arrived(self) -> bool:
        """Whether all that was sent is there, and some of it was read here.

        Raises:
            PoolError: it will not get there.
        """
        self._pending = [each for each in self._pending if not each.is_done()]
        is_read = self._sample is None or self._sample.is_ready
        return is_read and not self._pending

    @property
    def is_over(self) -> bool:
        """Whether nothing more will be sent."""
        return self.is_computed or self.is_cancelled or self.has_failed

    def report(self) -> Message:
        """What the decode pool is told once nothing is under way."""
        name = self.order.request_id
        if self.is_cancelled:
            return {"type": "cancelled", "id": name}
        if self._sample is None:
            return {"type": "failed", "id": name}
        return {
            "type": "done",
            "id": name,
            "num_tokens": len(self.order.token_ids),
            "num_cached": self.num_cached,
            "size_bytes": self.size_bytes,
            "exposed_us": round((time.perf_counter() - self.computed_s) * 1e6),
            "digest": self._sample.digest(),
        }

    def release(self) -> None:
        """Hold nothing any more; what is under way has arrived, or its route is closed."""
        for page in self._sent:
            self.cache.pages.drop(page)
        if self._state_slot:
            self.cache.state_slots.drop(self._state_slot)
        self._sent, self._state_slot = [], 0
        del self.reservations.lent[self.name]
