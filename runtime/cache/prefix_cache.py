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

from array import array
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from hashlib import blake2b

from tokenspeed_plan.plans.schema import Limits
from tokenspeed_plan.runtime.cache.eviction import Checkpoints
from tokenspeed_plan.runtime.cache.prefix_tree import Node, PrefixTree, path_to
from tokenspeed_plan.runtime.cache.ref_counts import SharedSlots
from tokenspeed_plan.runtime.metrics import Metrics

# Without recurrent state each whole page that the cache knows is a hit point; as many again may end
# inside of pages.
HIT_POINTS_PER_PAGE = 2


def as_words(token_ids: Seq[int]) -> memoryview:
    """Token ids as digests are taken of them, 8 bytes each."""
    return memoryview(array("q", token_ids))


def chain_digest(parent: bytes, words: memoryview) -> bytes:
    """The digest of a page, 16 bytes: of its tokens and, by its parent's digest, of all before."""
    return blake2b(words, digest_size=16, key=parent).digest()


def digests_of(parent: bytes, token_ids: Seq[int], page_size: int) -> list[bytes]:
    """The digests of whole pages that come after one of digest `parent`."""
    found = []
    # All at once: a long prompt has many pages, and running requests wait meanwhile.
    words = as_words(token_ids)
    for start in range(0, len(words), page_size):
        parent = chain_digest(parent, words[start : start + page_size])
        found.append(parent)
    return found


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
        oldest_first: whether the least recently used checkpoint is evicted in any model.

    Attributes:
        tree: what is known, by content.
        name_pages: gives pages their digests; a simulation has shorter ones.
        reclaim: gives back some memory that is held for a moment, where nothing can be evicted;
            False where there is none.
    """

    def __init__(
        self,
        limits: Limits,
        seed: bytes,
        page_bytes: int,
        slot_bytes: int,
        metrics: Metrics,
        enabled: bool = True,
        oldest_first: bool = False,
    ) -> None:
        self.enabled = enabled
        self.name_pages: Callable[[bytes, Seq[int], int], list[bytes]] = digests_of
        self.reclaim: Callable[[], bool] = lambda: False
        self.page_size = limits.page_size
        self.pages = SharedSlots(range(limits.num_pages))
        end = limits.num_state_slots - 1
        if not slot_bytes:
            end += HIT_POINTS_PER_PAGE * limits.num_pages
        # The first slot is always zero, the last one takes padding.
        self.state_slots = SharedSlots(range(1, end))
        self.tree = PrefixTree(seed, self.pages)
        self._checkpoints = Checkpoints(
            self.tree, self.state_slots, page_bytes, slot_bytes, oldest_first
        )
        self._metrics = metrics

    @property
    def root(self) -> Node:
        """The node of no tokens."""
        return self.tree.root

    @property
    def checkpoints(self) -> tuple[Node, ...]:
        """The nodes that have a checkpoint, in order of age."""
        return tuple(self._checkpoints.nodes)

    @property
    def pages_in_use(self) -> int:
        """Pages that are held by others than the cache: sequences, reservations, copies."""
        return sum(map(self.tree.is_in_use, self.pages))

    @property
    def state_slots_in_use(self) -> int:
        """State slots that are held by others than the cache."""
        cached, slots = {node.state_slot for node in self.checkpoints}, self.state_slots
        return sum(slots.holders(slot) > (slot in cached) for slot in slots)

    def extend(self, digests: list[bytes], token_ids: Seq[int], num_tokens: int) -> None:
        """Make `digests` cover all whole pages of the first `num_tokens` tokens."""
        if not self.enabled:
            return
        size, known = self.page_size, len(digests)
        parent = digests[-1] if digests else self.root.digest
        rest = token_ids[known * size : num_tokens // size * size]
        if rest:
            digests += self.name_pages(parent, rest, size)

    def path(self, digests: Seq[bytes], token_ids: Seq[int]) -> list[Node]:
        """The root, and the whole pages that are known of a sequence, even stateless."""
        if not self.enabled:
            return [self.root]
        return [self.root, *self.tree.walk(digests, token_ids)]

    def match(self, digests: Seq[bytes], token_ids: Seq[int], max_tokens: int) -> Hit:
        """The deepest checkpoint within the first `max_tokens` tokens; without any, the root."""
        path = self.path(digests, token_ids)
        known_tokens = min(path[-1].position, max_tokens // self.page_size * self.page_size)
        for node in reversed(path):
            tails = [t for t in node.tails if t.position <= max_tokens and t.matches(token_ids)]
            if tails:
                return Hit(max(tails, key=lambda tail: tail.position), known_tokens)
            if node.state_slot and node.position <= max_tokens:
                return Hit(node, known_tokens)
        return Hit(self.root, known_tokens)

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
        size, tree, has_state = self.page_size, self.tree, self._checkpoints.has_state
        begin = node.position // size
        words = tuple(token_ids[begin * size : num_tokens])
        for index in range(begin, num_tokens // size):
            start = (index - begin) * size
            tokens = words[start : start + size]
            known = tree.find(digests[index])
            if known is None:
                known = tree.insert_page(node, digests[index], tokens, pages[index])
            elif known.parent is not node or known.token_ids != tokens:
                return node  # another page with the same digest: what follows stays unknown
            elif known.page != pages[index]:
                self.pages.drop(pages[index])
                pages[index] = self.pages.share(known.page)
            node = known
            if not has_state and not node.state_slot:
                self._checkpoints.add_hit_point(node, self.take_state_slot())
        self._checkpoints.touch(node)
        return node

    def add_checkpoint(
        self, node: Node, token_ids: Seq[int], position: int, state_slot: int, pages: Seq[int]
    ) -> Node:
        """Enter the state after `position` tokens, which end at `node` or in the page after it.

        Returns:
            The node that has it; the given one where it cannot be entered.
        """
        rest = tuple(token_ids[node.position : position])
        if not self.enabled or not state_slot or len(rest) >= self.page_size:
            return node
        if rest:
            index = node.position // self.page_size
            node = self.tree.insert_tail(node, rest, pages[index])
        self._checkpoints.add(node, state_slot)
        return node

    def take_page(self) -> int | None:
        """A page for the caller; None where all pages are in use."""
        if self.pages.num_free:
            return self.pages.take()
        return next(iter(self.take_pages(1)), None)

    def take_pages(self, count: int) -> list[int]:
        """Pages for the caller; fewer where all others are in use."""
        found = self.pages.take_some(count)
        while len(found) < count:
            if not self._evict(self._checkpoints.frees_a_page) and not self.reclaim():
                break
            found += self.pages.take_some(count - len(found))
        return found

    def take_state_slot(self) -> int:
        """A state slot for the caller, who knows that there is one."""
        slot = self.take_spare_state_slot()
        assert slot is not None, "the running sequences hold more state slots than their share"
        return slot

    def take_spare_state_slot(self) -> int | None:
        """A state slot for the caller; None where running sequences hold all of them."""
        while not self.state_slots.num_free:
            if not self._evict(lambda node: True) and not self.reclaim():
                return None
        return self.state_slots.take()

    def has_spare_state_slot(self, hit: Hit) -> bool:
        """Whether a state slot can be taken while a hit is held."""
        slots = self.state_slots
        others = (node for node in self._checkpoints.nodes if node is not hit.checkpoint)
        if slots.num_free or any(slots.counts[node.state_slot] == 1 for node in others):
            return True
        return self.reclaim() and self.has_spare_state_slot(hit)

    def touch(self, node: Node) -> None:
        """Note that a checkpoint was used."""
        self._checkpoints.touch(node)

    def forget_checkpoint(self, state_slot: int) -> None:
        """Leave a state slot to the sequence that holds it, too."""
        for node in self.checkpoints:
            if node.state_slot == state_slot:
                self._checkpoints.forget(node)

    def drop_pages(self, pages: Seq[int]) -> None:
        """Give back pages that the caller holds, in the order of their tokens.

        What nobody needs any more is freed: also a whole page that was continued on the page of a
        tail, and whose checkpoint went while the caller held the tail.
        """
        self.pages.drop_all(pages)
        self.tree.prune_from(pages)

    def prove(self, path: Seq[Node], token_ids: Seq[int]) -> None:
        """Note that a sequence got its answer from what is cached of its tokens."""
        for node in path:
            node.prove(token_ids)

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
        num_pages = len(self.tree)
        if not self._checkpoints.evict(is_useful):
            return False
        self._metrics.evicted_checkpoints += 1
        self._metrics.evicted_pages += num_pages - len(self.tree)
        return True


def _with_tails(path: Seq[Node], token_ids: Seq[int]) -> list[Node]:
    """The nodes of a path, each before the tails that a sequence of these tokens may begin with."""
    found = []
    for node in path:
        found += [node, *(tail for tail in node.tails if tail.matches(token_ids))]
    return found
