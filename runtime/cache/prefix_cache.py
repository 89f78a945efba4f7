"""The prefix cache: pages of keys and values by content, and checkpoints of the recurrent state.

A hit needs both: all pages up to a position, and a checkpoint there. What the cache holds is never
written again: a sequence that continues after a tail copies that one page, and takes over the state
by the number of its slot. Pages that no checkpoint needs and no sequence holds are freed at once,
so each leaf that is not in use is a checkpoint. When a page or a state slot is needed, a checkpoint
is evicted, together with the pages that only it needed.

A model without recurrent state needs no snapshot: each page in the cache ends with a checkpoint,
whose state slot is only a number, without memory.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from tokenspeed_plan.plans.schema import Limits
from tokenspeed_plan.runtime.cache.eviction import Checkpoints
from tokenspeed_plan.runtime.cache.prefix_tree import Node, PrefixTree, path_to
from tokenspeed_plan.runtime.cache.ref_counts import SharedSlots
from tokenspeed_plan.runtime.metrics import Metrics

# Without recurrent state each whole page that the cache knows is a hit point; as many again may end
# inside of pages.
HIT_POINTS_PER_PAGE = 2


def chain_digest(parent: bytes, token_ids: Seq[int]) -> bytes:
    """The digest of a page, 16 bytes: of its tokens and, by its parent's digest, of all before."""
    data = np.asarray(token_ids, dtype=np.int64).tobytes()
    page_hash = blake2b(data, digest_size=16, key=parent)
    return page_hash.digest()


@dataclass(frozen=True, slots=True)
class Hit:
    """What the cache has of a prompt: its deepest checkpoint, and how many tokens have pages."""

    checkpoint: Node
    known_tokens: int

    @property
    def num_tokens(self) -> int:
        """Tokens that need not be computed."""
        return self.checkpoint.position


class PrefixCache:
    """All pages and state slots; running sequences take theirs here, too.

    Args:
        limits: how many there are.
        seed: begins the chain of digests.
        page_bytes: size of a page in all layers.
        slot_bytes: size of a state slot in all layers; 0 without recurrent state.
        metrics: counts evictions.
        enabled: without it nothing is found, and nothing is kept.
    """

    def __init__(
        self,
        limits: Limits,
        seed: bytes,
        page_bytes: int,
        slot_bytes: int,
        metrics: Metrics,
        enabled: bool = True,
    ) -> None:
        self.enabled = enabled
        self.page_size = limits.page_size
        self.pages = SharedSlots(range(limits.num_pages))
        end = limits.num_state_slots - 1
        if not slot_bytes:
            end += HIT_POINTS_PER_PAGE * limits.num_pages
        # The first slot is always zero, the last one takes padding.
        self.state_slots = SharedSlots(range(1, end))
        self._tree = PrefixTree(seed, self.pages)
        self.follow = self._tree.follow
        self._checkpoints = Checkpoints(self._tree, self.state_slots, page_bytes, slot_bytes)
        self._metrics = metrics

    @property
    def root(self) -> Node:
        """The node of no tokens."""
        return self._tree.root

    @property
    def checkpoints(self) -> tuple[Node, ...]:
        """The nodes that have a checkpoint, in order of age."""
        return tuple(self._checkpoints.nodes)

    def nodes(self) -> tuple[Node, ...]:
        """All nodes below the root: whole pages, and tails."""
        return tuple(self._tree)

    def find(self, digest: bytes) -> Node | None:
        """The whole page of that digest."""
        return self._tree.find(digest)

    @property
    def pages_in_use(self) -> int:
        """Pages that running sequences hold."""
        return sum(map(self._tree.is_in_use, self.pages))

    @property
    def state_slots_in_use(self) -> int:
        """State slots that running sequences hold."""
        cached = {node.state_slot for node in self.checkpoints}
        in_use = 0
        for slot in self.state_slots:
            num_own_holders = int(slot in cached)
            if self.state_slots.holders(slot) > num_own_holders:
                in_use += 1
        return in_use

    def extend(self, digests: list[bytes], token_ids: Seq[int], num_tokens: int) -> None:
        """Make `digests` cover all whole pages of the first `num_tokens` tokens."""
        if not self.enabled:
            return
        size = self.page_size
        parent = self.root.digest
        if digests:
            parent = digests[-1]
        first = len(digests) * size
        for start in range(first, num_tokens - size + 1, size):
            page_ids = token_ids[start : start + size]
            parent = chain_digest(parent, page_ids)
            digests.append(parent)

    def match(self, digests: Seq[bytes], token_ids: Seq[int], max_tokens: int) -> Hit:
        """The deepest checkpoint within the first `max_tokens` tokens; without any, the root."""
        path = [self.root]
        if self.enabled:
            path += self._tree.walk(digests, token_ids)
        whole_pages = max_tokens // self.page_size
        known_tokens = min(path[-1].position, whole_pages * self.page_size)
        for node in reversed(path):
            tails = [
                tail
                for tail in node.tails
                if tail.position <= max_tokens and tail.matches(token_ids)
            ]
            if tails:
                return Hit(max(tails, key=lambda tail: tail.position), known_tokens)
            if node.state_slot and node.position <= max_tokens:
                return Hit(node, known_tokens)
        return Hit(self.root, known_tokens)

    def share_pages(
        self, digests: Seq[bytes], token_ids: Seq[int], max_tokens: int
    ) -> tuple[Node, list[int]]:
        """Hold the whole pages that are known of the first `max_tokens` tokens, even stateless.

        Returns:
            The node of the last of them, and the pages.
        """
        nodes = [self.root]
        if self.enabled:
            nodes += self._tree.walk(digests[: max_tokens // self.page_size], token_ids)
        return nodes[-1], [self.pages.share(node.page) for node in nodes[1:]]

    def use(self, hit: Hit) -> tuple[Node, list[int]]:
        """Hold what a hit needs: its state slot and its whole pages.

        A hit that is a tail keeps its page as long as the caller holds its state slot: the caller
        copies that page.

        Returns:
            The node of the last whole page, and the whole pages.
        """
        last_whole = hit.checkpoint
        self._checkpoints.use(last_whole)
        is_tail = not last_whole.digest
        if is_tail and last_whole.parent is not None:
            last_whole = last_whole.parent
        pages = []
        for node in path_to(last_whole):
            pages.append(self.pages.share(node.page))
        return last_whole, pages

    def add_pages(
        self,
        node: Node,
        digests: Seq[bytes],
        token_ids: Seq[int],
        num_tokens: int,
        pages: list[int],
    ) -> Node:
        """Enter the whole pages after `node` within the first `num_tokens` tokens.

        The caller holds them. Where the cache knows a page already, the caller's copy of it is
        dropped, and `pages` is changed to the known one.

        Returns:
            The node of the last page that was entered.
        """
        if not self.enabled:
            return node
        size = self.page_size
        first_page = node.position // size
        for index in range(first_page, num_tokens // size):
            start = index * size
            tokens = tuple(token_ids[start : start + size])
            known = self._tree.find(digests[index])
            if known is None:
                known = self._tree.insert_page(node, digests[index], tokens, pages[index])
            elif known.parent is not node or known.token_ids != tokens:
                return node  # another page with the same digest: what follows stays unknown
            elif known.page != pages[index]:
                self.pages.drop(pages[index])
                pages[index] = self.pages.share(known.page)
            node = known
            if not self._checkpoints.has_state and not node.state_slot:
                slot = self.take_state_slot()
                self._checkpoints.add_hit_point(node, slot)
        self._checkpoints.touch(node)
        return node

    def add_checkpoint(
        self, node: Node, token_ids: Seq[int], position: int, state_slot: int, pages: Seq[int]
    ) -> None:
        """Enter the state after `position` tokens, which end at `node` or in the page after it."""
        rest = tuple(token_ids[node.position : position])
        if not self.enabled or not state_slot or len(rest) >= self.page_size:
            return
        if rest:
            index = node.position // self.page_size
            node = self._tree.insert_tail(node, rest, pages[index])
        self._checkpoints.add(node, state_slot)

    def take_page(self) -> int | None:
        """A page for the caller; None where all pages are in use."""
        while not self.pages.num_free:
            if not self._evict(self._checkpoints.frees_a_page):
                return None
        return self.pages.take()

    def take_state_slot(self) -> int:
        """A state slot for the caller, who knows that there is one."""
        slot = self.take_spare_state_slot()
        assert slot is not None, "the running sequences hold more state slots than their share"
        return slot

    def take_spare_state_slot(self) -> int | None:
        """A state slot for the caller; None where running sequences hold all of them."""
        while not self.state_slots.num_free:
            if not self._evict(lambda node: True):
                return None
        return self.state_slots.take()

    def has_spare_state_slot(self, hit: Hit) -> bool:
        """Whether a state slot can be taken while a hit is held."""
        return bool(self.state_slots.num_free) or any(
            self.state_slots.holders(node.state_slot) == 1
            for node in self.checkpoints
            if node is not hit.checkpoint
        )

    def forget_checkpoint(self, state_slot: int) -> None:
        """Leave a state slot to the sequence that holds it, too."""
        for node in self.checkpoints:
            if node.state_slot == state_slot:
                self._checkpoints.forget(node)

    def prune(self, node: Node | None) -> None:
        """Free the pages from a node towards the root that no checkpoint and no sequence needs."""
        self._tree.prune(node)

    def prove(self, path: Seq[Node], token_ids: Seq[int]) -> None:
        """Note that a sequence got its answer from what is cached of its tokens."""
        for node in _with_tails(path, token_ids):
            node.proven = True

    def forget_unproven(self, path: Seq[Node], token_ids: Seq[int]) -> None:
        """Give up what a sequence that failed may have begun with, unless others got answers there.

        NaN in a page or a state spreads to all that go on from it; it may come of these tokens, or
        of a fault that is over. What is proven stays, so that nobody can flush what others share.

        Args:
            path: the root and the pages of the sequence after it; they need not be cached any more.
            token_ids: of the sequence.
        """
        for node in reversed(_with_tails(path, token_ids)):
            if node.state_slot and not node.proven:
                self._checkpoints.forget(node)

    def _evict(self, is_useful: Callable[[Node], bool]) -> bool:
        """Evict one checkpoint and the pages that only it needed; False where there is none."""
        num_pages = len(self._tree)
        if not self._checkpoints.evict(is_useful):
            return False
        num_evicted = num_pages - len(self._tree)
        self._metrics.evicted_checkpoints += 1
        self._metrics.evicted_pages += num_evicted
        return True


def _with_tails(path: Seq[Node], token_ids: Seq[int]) -> list[Node]:
    """The nodes of a path, each before the tails that a sequence of these tokens may begin with."""
    found = []
    for node in path:
        found += [node, *(tail for tail in node.tails if tail.matches(token_ids))]
    return found
