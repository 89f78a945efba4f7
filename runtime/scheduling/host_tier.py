"""The second tier of the prefix cache: checkpoints in the memory of the host.

It is a prefix cache of its own, over slots of the host, and evicts what was not used for longest. A
checkpoint is stored when a sequence leaves it behind at its end, or another one begins there: so it
is on the host before the device must give it up, and nobody waits for a copy to get a page. What is
copied stays held on both sides until the copy is over.

A request whose prompt has a deeper checkpoint here than on the device waits in the queue, as one
whose prompt another pool computes. The pages that the device lacks are copied back, with the state,
and entered into its cache; then it starts like any other, and so do those that have waited for the
same checkpoint. Half a checkpoint is used by nobody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.cache.held import Held
from tokenspeed_plan.runtime.cache.prefix_cache import Hit, PrefixCache
from tokenspeed_plan.runtime.cache.prefix_tree import Node, path_to
from tokenspeed_plan.runtime.cache.slot_copies import Copying, SlotCopy, SlotMover
from tokenspeed_plan.runtime.metrics import Metrics
from tokenspeed_plan.runtime.scheduling.reservations import Reservation, Reservations
from tokenspeed_plan.runtime.scheduling.sequence import Sequence

_NO_SLOTS = {"num_pages": 0, "num_state_slots": 2}


@dataclass(slots=True, eq=False)
class _Move:
    """A checkpoint of a sequence on its way, and what it takes of the host."""

    sequence: Sequence
    there: Held
    copying: Copying


@dataclass(slots=True, eq=False)
class _Store(_Move):
    """One on its way to the host, with so many tokens; its pages follow those of `there.node`."""

    position: int
    here: Held


@dataclass(slots=True, eq=False)
class _Load(_Move):
    """One on its way back, for a sequence that waits for it; `others` begin there, too."""

    reservation: Reservation
    others: list[Sequence] = field(default_factory=list)


class HostTier:
    """The second tier of a pool; without slots where the plan has none.

    Args:
        plan: says how large it is.
        cache: of the device.
        reservations: take memory of the device for what comes back.
        metrics: count what is copied.
        mover: copies; without one there is no tier.

    Attributes:
        tier: what the host has.
    """

    def __init__(
        self,
        plan: Plan,
        cache: PrefixCache,
        reservations: Reservations,
        metrics: Metrics,
        mover: SlotMover | None,
    ) -> None:
        spec, size = plan.pool.host_cache, _NO_SLOTS
        self._least_tokens = 1
        if spec is not None and mover is not None and cache.enabled:
            size = {"num_pages": spec.num_pages, "num_state_slots": spec.num_states + 2}
            self._least_tokens = spec.least_tokens
        self._page_bytes = plan.pool.slot_bytes("kv_cache")
        self._state_bytes = plan.pool.slot_bytes("state")
        self._evictions = Metrics()
        self.tier = PrefixCache(
            plan.pool.limits.model_copy(update=size),
            cache.root.digest,
            self._page_bytes,
            self._state_bytes,
            self._evictions,
            oldest_first=True,
        )
        self._most_tokens = len(self.tier.pages) * self.tier.page_size
        self._cache = cache
        self._reservations = reservations
        self._metrics = metrics
        self._mover = mover
        self._stores: deque[_Store] = deque()
        self._loads: deque[_Load] = deque()
        cache.reclaim = self._end_one_store

    def keep(self, checkpoint: Node, sequence: Sequence) -> None:
        """Store a checkpoint of a sequence, if it can pay, is not there, and there is room now."""
        is_worth_it = self._least_tokens <= checkpoint.position <= self._most_tokens
        if not checkpoint.state_slot or not is_worth_it:
            return
        twin = self._twin(checkpoint)
        if twin is not None and twin.state_slot:
            self.tier.touch(twin)
            return
        size = self.tier.page_size
        digests = sequence.digests[: checkpoint.position // size]
        *_, known = self.tier.path(digests, sequence.token_ids)
        new = [node.page for node in path_to(checkpoint)[known.position // size :]]
        there = self._take(known, len(new))
        self._metrics.host_evicted_checkpoints = self._evictions.evicted_checkpoints
        if there is None:
            return
        here = Held.of(self._cache, checkpoint)
        copying = self._copy(False, new, there.pages[: len(new)], here.state_slot, there.state_slot)
        self._stores.append(_Store(sequence, there, copying, checkpoint.position, here))
        self._metrics.host_stored_bytes += self._bytes(len(new))
        self._end_stores()

    def _twin(self, node: Node) -> Node | None:
        """What the host has in the place of a node of the device's cache, by its digest alone."""
        whole = node if node.digest else node.parent
        if whole is None or whole.parent is None:
            twin: Node | None = self.tier.root
        else:
            twin = self.tier.tree.find(whole.digest)
        if twin is None or whole is node:
            return twin
        return next((tail for tail in twin.tails if tail.token_ids == node.token_ids), None)

    def _take(self, known: Node, num_pages: int) -> Held | None:
        """Room for pages after one that the host has, and for a state; None where there is none."""
        held = Held(self.tier, known, [])
        if known.parent is not None:
            held.pages.append(self.tier.pages.share(known.page))  # so that it stays
        new = self.tier.take_pages(num_pages)
        held.pages[:0] = sorted(new)  # neighbours are copied as one
        held.state_slot = self.tier.take_spare_state_slot() or 0
        if len(new) < num_pages or not held.state_slot:
            held.drop()
            return None
        return held

    def _copy(
        self, is_load: bool, pages: Seq[int], host_pages: Seq[int], here: int, there: int
    ) -> Copying:
        assert self._mover is not None, "without it nothing is in this tier"
        return self._mover.start_copy(
            SlotCopy(is_load, tuple(pages), tuple(host_pages), here, there)
        )

    def _bytes(self, num_pages: int) -> int:
        """Of so many pages and a state."""
        return num_pages * self._page_bytes + self._state_bytes

    def fetch(self, sequence: Sequence, hit: Hit, running: Iterable[Sequence]) -> bool:
        """Begin to copy back what the host has of a prompt, if that pays and there is room.

        Args:
            sequence: fits now.
            hit: what the device has of it.
            running: sequences that hold memory.

        Returns:
            Whether the sequence waits for it.
        """
        found = self._deeper(sequence, hit)
        if found is None:
            return False
        for load in self._loads:
            is_same = load.there.state_slot == found.checkpoint.state_slot
            if is_same and self._is_wanted(load):
                load.others.append(sequence)
                sequence.is_elsewhere = True
                return True
        there = Held.of(self.tier, found.checkpoint)
        reservation = self._reservations.reserve(sequence, running, found.num_tokens)
        if reservation is None:
            there.drop()
            return False
        host_pages = [node.page for node in path_to(found.checkpoint)]
        pages = reservation.new_pages
        copying = self._copy(
            True,
            pages,
            host_pages[reservation.num_known :],
            reservation.state_slot,
            there.state_slot,
        )
        sequence.is_elsewhere = True
        self._loads.append(_Load(sequence, there, copying, reservation))
        self._metrics.host_hits += 1
        self._metrics.host_hit_tokens += found.num_tokens - hit.num_tokens
        self._metrics.host_loaded_bytes += self._bytes(len(pages))
        return True

    def _deeper(self, sequence: Sequence, hit: Hit) -> Hit | None:
        """A checkpoint of the host that saves enough tokens; all with a page more, or none.

        A sequence for which one has come begins there, even if the host has a deeper one by now.
        """
        if sequence.request.request_id in self._reservations.held:
            return None
        digests, token_ids = sequence.digests, sequence.token_ids
        next_page = digests[hit.num_tokens // self.tier.page_size :][:1]
        if sequence.is_scored or not next_page or self.tier.tree.find(next_page[0]) is None:
            return None
        found = self.tier.match(digests, token_ids, len(token_ids) - 1)
        if found.num_tokens - hit.num_tokens < self._least_tokens:
            return None
        return found

    def poll(self, is_idle: bool) -> bool:
        """End the copies that are over; where nothing else is to be done, wait for one.

        Returns:
            Whether memory was given back, or a sequence may start.
        """
        for load in self._loads:
            name = load.sequence.request.request_id
            if load.sequence.state == "cancelled" and self._is_wanted(load):
                self._reservations.abandon(name)
        if is_idle and self._loads:
            self._loads[0].copying.wait()
        num_open = len(self._stores) + len(self._loads)
        self._end_stores()
        while self._loads and self._loads[0].copying.is_done():
            self._end_load(self._loads.popleft())
        return len(self._stores) + len(self._loads) < num_open

    def _is_wanted(self, load: _Load) -> bool:
        held = self._reservations.held.get(load.sequence.request.request_id)
        return held is load.reservation

    def _end_load(self, load: _Load) -> None:
        """Let the device's cache have what came."""
        self._end_copy(load.copying)
        if self._is_wanted(load):
            self._reservations.fulfil(load.sequence)
        else:
            self._reservations.settle(load.reservation)
        for sequence in (load.sequence, *load.others):
            sequence.is_elsewhere = False
        load.there.drop()

    def _end_stores(self) -> None:
        while self._stores and self._stores[0].copying.is_done():
            self._end_one_store()

    def _end_one_store(self) -> bool:
        """Wait for the oldest store, and give back what it holds; False where there is none."""
        if not self._stores:
            return False
        store = self._stores.popleft()
        store.copying.wait()
        self._end_copy(store.copying)
        self._enter(store)
        store.here.drop()
        return True

    def _enter(self, store: _Store) -> None:
        """Let the tier have what was stored."""
        sequence, there, tier = store.sequence, store.there, self.tier
        num_known = there.node.position // tier.page_size
        num_new = -(-store.position // tier.page_size) - num_known
        pages = [*[-1] * num_known, *there.pages[:num_new]]
        node = tier.add_pages(
            there.node, sequence.digests, sequence.token_ids, store.position, pages
        )
        tier.add_checkpoint(node, sequence.token_ids, store.position, there.state_slot, pages)
        there.pages[:num_new] = pages[num_known:]
        there.node = node
        there.drop()

    def _end_copy(self, copying: Copying) -> None:
        assert self._mover is not None, "without it nothing is copied"
        self._mover.end_copy(copying)

    def prove(self, sequence: Sequence) -> None:
        """Note that a sequence got its answer from what is here of it; see `PrefixCache.prove`."""
        self.tier.prove(self._path(sequence), sequence.token_ids)

    def forget_unproven(self, sequence: Sequence) -> None:
        """Give up what a sequence that failed may have begun with, or left here."""
        while self._end_one_store():
            pass
        self.tier.forget_unproven(self._path(sequence), sequence.token_ids)

    def _path(self, sequence: Sequence) -> list[Node]:
        return self.tier.path(sequence.digests, sequence.token_ids)

    def close(self) -> None:
        """Let all that is launched from now on wait for the copies that are on their way."""
        moves: list[_Move] = [*self._stores, *self._loads]
        for move in moves:
            self._end_copy(move.copying)
