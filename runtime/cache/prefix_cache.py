"""The prefix cache: pages of keys and values by content, with checkpoints of the recurrent state.

A hit needs both: all pages up to a position, and a checkpoint there. What the cache holds is never
written again: a sequence that goes on after a tail copies that one page, and state is handed on by
the number of its slot. Pages that no checkpoint needs and no sequence holds are freed at once, so
each leaf that is not in use is a checkpoint. When a page or a state slot is needed, a checkpoint is
evicted, and with it the pages that only it needed.

A model without recurrent state needs no snapshot: each page that the cache knows ends with a
checkpoint whose state slot is a mere number, without memory.
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
    """The digest of a page: of its tokens, and through its parent's of all tokens before it."""
    data = np.asarray(token_ids, dtype=np.int64).tobytes()
    return blake2b(data, digest_size=16, key=parent).digest()


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
        return sum(self.state_slots.holders(slot) > (slot in cached) for slot in self.state_slots)

    def extend(self, digests: list[bytes], token_ids: Seq[int], num_tokens: int) -> None:
        """Make `digests` cover all whole pages of the first `num_tokens` tokens."""
        if not self.enabled:
            return
        size = self.page_size
        for start in range(len(digests) * size, num_tokens - size + 1, size):
            parent = digests[-1] if digests else self.root.digest
            digests.append(chain_digest(parent, token_ids[start : start + size]))

    def match(self, digests: Seq[bytes], token_ids: Seq[int], max_tokens: int) -> Hit:
        """The deepest checkpoint within the first `max_tokens` tokens; the root where there is none."""
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

    def use(self, hit: Hit) -> tuple[Node, list[int]]:
        """Hold what a hit needs: its state slot and its whole pages.

        A tail keeps its page, from which the caller is to copy, as long as the caller holds its
        state slot.

        Returns:
            The node of the last whole page, and all pages.
        """
        node = hit.checkpoint
        self._checkpoints.use(node)
        is_tail = node.parent is not None and not node.digest
        whole = node.parent if node.parent is not None and is_tail else node
        return whole, [self.pages.share(step.page) for step in path_to(whole)]

    def add_pages(
        self,
        node: Node,
        digests: Seq[bytes],
        token_ids: Seq[int],
        num_tokens: int,
        pages: list[int],
    ) -> Node:
        """Enter the whole pages after `node` within `num_tokens`; the caller holds them.

        Where a page is known already, the caller's is given up for the known one: `pages` is
        changed.
        """
        if not self.enabled:
            return node
        size = self.page_size
        for index in range(node.position // size, num_tokens // size):
            tokens = tuple(token_ids[index * size : (index + 1) * size])
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
                self._checkpoints.add_hit_point(node, self.take_state_slot())
        self._checkpoints.touch(node)
        return node

    def add_checkpoint(
        self, node: Node, token_ids: Seq[int], position: int, state_slot: int, pages: Seq[int]
    ) -> None:
        """Enter the state after `position` tokens, which end with `node` or in the page after it."""
        rest = tuple(token_ids[node.position : position])
        if not self.enabled or not state_slot or len(rest) >= self.page_size:
            return
        if rest:
            page = pages[node.position // self.page_size]
            node = self._tree.insert_tail(node, rest, page)
        self._checkpoints.add(node, state_slot)

    def take_page(self) -> int | None:
        """A page for the caller; None where all that is left is in use."""
        while not self.pages.num_free:
            if not self._evict(self._checkpoints.frees_a_page):
                return None
        return self.pages.take()

    def take_state_slot(self) -> int:
        """A state slot for the caller; there is always one, as each sequence has its share."""
        while not self.state_slots.num_free:
            assert self._evict(lambda node: True), (
                "the running sequences hold more state slots than are theirs"
            )
        return self.state_slots.take()

    def prune(self, node: Node | None) -> None:
        """Free the pages from a node upwards that no checkpoint and no sequence needs."""
        self._tree.prune(node)

    def _evict(self, is_useful: Callable[[Node], bool]) -> bool:
        num_pages = len(self._tree)
        if not self._checkpoints.evict(is_useful):
            return False
        self._metrics.evicted_checkpoints += 1
        self._metrics.evicted_pages += num_pages - len(self._tree)
        return True
