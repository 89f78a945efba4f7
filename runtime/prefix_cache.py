"""The prefix cache: pages of keys and values by content, and checkpoints of the recurrent state among them.

A tree whose nodes are pages: a node is known by the digest of its tokens chained to its parent's
digest, so that equal prefixes are equal nodes whoever computed them. A checkpoint is a row of
recurrent state that hangs at the end of a node; one in the middle of a page hangs at a `tail`, a
node of fewer tokens. A hit needs both: all pages up to a position and a checkpoint there.

What the cache holds is never written again. A sequence that goes on after a tail copies that one
page; state is handed on by the number of its row. Pages that no checkpoint needs and no sequence
holds are freed at once, so each leaf that is not in use is a checkpoint. When a place is needed,
the checkpoint goes that is cheapest to compute again per byte, aged as GreedyDual does (Cao and
Irani, USENIX 1997), and with it the pages that only it needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from tokenspeed_plan.plans.schema import Limits
from tokenspeed_plan.runtime.metrics import Metrics
from tokenspeed_plan.runtime.ref_counts import Pool


def chain_digest(parent: bytes, token_ids: Seq[int]) -> bytes:
    """The name of a page: its tokens, and through its parent all tokens before it."""
    return blake2b(
        np.asarray(token_ids, dtype=np.int64).tobytes(), digest_size=16, key=parent
    ).digest()


@dataclass(slots=True, eq=False)
class Node:
    """A page with its tokens, or the first tokens of one. `position` counts all tokens up to its end.

    `row` is the checkpoint there, 0 where there is none. `clock` is the cache's age when it was
    last of use.
    """

    parent: Node | None
    digest: bytes
    token_ids: tuple[int, ...]
    position: int
    page: int
    children: dict[bytes, Node] = field(default_factory=dict)
    tails: list[Node] = field(default_factory=list)
    row: int = 0
    clock: float = 0.0

    @property
    def is_leaf(self) -> bool:
        """Whether nothing goes on from here."""
        return not self.children and not self.tails


@dataclass(frozen=True, slots=True)
class Hit:
    """What the cache knows of a prompt: its deepest checkpoint, and how many tokens have pages at all."""

    checkpoint: Node
    known_tokens: int

    @property
    def num_tokens(self) -> int:
        """Tokens that need not be computed."""
        return self.checkpoint.position


class PrefixCache:
    """All pages and rows, those of the running sequences included: they draw theirs here too.

    `page_bytes` and `row_bytes` weigh what an eviction frees.
    """

    def __init__(
        self,
        limits: Limits,
        seed: bytes,
        page_bytes: int,
        row_bytes: int,
        metrics: Metrics,
        enabled: bool = True,
    ) -> None:
        self.enabled = enabled
        self.page_size = limits.page_size
        self.pages = Pool(range(limits.num_pages))
        self.rows = Pool(
            range(1, limits.num_state_slots - 1)
        )  # the first is the zero row, the last takes padding
        self.root = Node(None, seed, (), 0, -1)
        self._index: dict[bytes, Node] = {}
        self._nodes_on = Counter[int]()  # page -> nodes
        self._checkpoints: dict[Node, None] = {}  # in order of age
        self._page_bytes, self._row_bytes = page_bytes, row_bytes
        self._clock = 0.0
        self._metrics = metrics

    @property
    def pages_in_use(self) -> int:
        """Pages that running sequences hold."""
        return sum(self.pages.holders(page) > self._nodes_on[page] for page in self.pages)

    @property
    def rows_in_use(self) -> int:
        """Rows that running sequences hold."""
        kept = {node.row for node in list(self._checkpoints)}
        return sum(self.rows.holders(row) > (row in kept) for row in self.rows)

    # Looking up.

    def extend(self, digests: list[bytes], token_ids: Seq[int], num_tokens: int) -> None:
        """Make `digests` cover all whole pages of the first `num_tokens` tokens."""
        size = self.page_size
        for start in range(len(digests) * size, num_tokens - size + 1 if self.enabled else 0, size):
            parent = digests[-1] if digests else self.root.digest
            digests.append(chain_digest(parent, token_ids[start : start + size]))

    def match(self, digests: Seq[bytes], token_ids: Seq[int], most: int) -> Hit:
        """The deepest checkpoint within the first `most` tokens; the root's, of no tokens, where there is none."""
        path = [self.root, *self._walk(digests, token_ids)]
        known = min(path[-1].position, most // self.page_size * self.page_size)
        for node in reversed(path):
            found = [
                tail for tail in node.tails if tail.position <= most and _agree(tail, token_ids)
            ]
            if found:
                return Hit(max(found, key=lambda tail: tail.position), known)
            if node.row and node.position <= most:
                return Hit(node, known)
        return Hit(self.root, known)

    def _walk(self, digests: Seq[bytes], token_ids: Seq[int]) -> Iterator[Node]:
        """Whole pages from the root on; the tokens are compared too, for digests can collide."""
        parent = self.root
        for digest in digests if self.enabled else ():
            node = self._index.get(digest)
            if node is None or node.parent is not parent or not _agree(node, token_ids):
                return
            yield node
            parent = node

    def use(self, hit: Hit) -> tuple[Node, list[int]]:
        """Hold what a hit needs: its row and its whole pages; returns the node of the last one, and all pages.

        A tail keeps its page, from which the caller is to copy, as long as the caller holds its
        row.
        """
        node = hit.checkpoint
        if node.row:
            self.rows.share(node.row)
            node.clock = self._clock
        whole = node.parent if node.parent and not node.digest else node
        return whole, [self.pages.share(step.page) for step in path_to(whole)]

    # Entering.

    def add_pages(
        self,
        node: Node,
        digests: Seq[bytes],
        token_ids: Seq[int],
        num_tokens: int,
        pages: list[int],
    ) -> Node:
        """Enter the whole pages after `node` within `num_tokens`; the caller holds them, and all before.

        Where a page is known already, the caller's is given up for the known one: `pages` is
        changed.
        """
        size = self.page_size
        for index in range(node.position // size, num_tokens // size if self.enabled else 0):
            tokens = tuple(token_ids[index * size : (index + 1) * size])
            known = self._index.get(digests[index])
            if known is None:
                known = Node(node, digests[index], tokens, node.position + size, pages[index])
                self._index[known.digest] = node.children[known.digest] = known
                self._hold(known)
            elif known.parent is not node or known.token_ids != tokens:
                return node  # another page with the same digest: what follows stays unknown
            elif known.page != pages[index]:
                self.pages.drop(pages[index])
                pages[index] = self.pages.share(known.page)
            node = known
        return node

    def add_checkpoint(
        self, node: Node, token_ids: Seq[int], position: int, row: int, pages: Seq[int]
    ) -> None:
        """Enter a row as the state after `position` tokens, which lie in the page after `node` or end with it."""
        rest = tuple(token_ids[node.position : position])
        if not self.enabled or not row or len(rest) >= self.page_size:
            return
        if rest:
            node = self._tail(node, rest, pages[node.position // self.page_size])
        if not node.row:
            node.row = self.rows.share(row)
            self._checkpoints[node] = None
        node.clock = self._clock

    def _tail(self, parent: Node, token_ids: tuple[int, ...], page: int) -> Node:
        found = next((tail for tail in parent.tails if tail.token_ids == token_ids), None)
        if found is None:
            found = Node(parent, b"", token_ids, parent.position + len(token_ids), page)
            parent.tails.append(found)
            self._hold(found)
        return found

    def _hold(self, node: Node) -> None:
        self.pages.share(node.page)
        self._nodes_on[node.page] += 1

    # Drawing, and giving up for it.

    def take_page(self) -> int | None:
        """A page for the caller; None where all that is left is in use."""
        while not self.pages.num_free:
            if not self._evict(self._frees_pages):
                return None
        return self.pages.take()

    def take_row(self) -> int:
        """A row for the caller; there is always one, as sequences hold no more than their slots'."""
        while not self.rows.num_free:
            assert self._evict(lambda node: True), (
                "the running sequences hold more rows than their slots have"
            )
        return self.rows.take()

    def _frees_pages(self, node: Node) -> bool:
        return node.is_leaf and not self._in_use(node)

    def _in_use(self, node: Node) -> bool:
        return self.pages.holders(node.page) > self._nodes_on[node.page]

    def _evict(self, useful: Callable[[Node], bool]) -> bool:
        """Give up the checkpoint that is cheapest to have again, of those that nobody reads."""
        found = [
            node for node in self._checkpoints if self.rows.holders(node.row) == 1 and useful(node)
        ]
        if not found:
            return False
        self._clock, victim = min(
            ((self._worth(node), node) for node in found), key=lambda pair: pair[0]
        )
        self._metrics.evicted_checkpoints += 1
        before = len(self._index)
        self._remove_checkpoint(victim)
        self._metrics.evicted_pages += before - len(self._index)
        return True

    def _worth(self, node: Node) -> float:
        """Tokens to compute again per byte that is freed, on top of the age at its last use."""
        freed, step = self._row_bytes, node
        while step.parent is not None and self._goes_with(step, node):
            freed += self._page_bytes
            step = step.parent
        return node.clock + (node.position - _previous(node)) / freed

    def _goes_with(self, step: Node, node: Node) -> bool:
        """Whether the page of a node above a checkpoint would be freed with it."""
        alone = step is node or not step.row
        return (
            alone
            and len(step.children) + len(step.tails) <= (step is not node)
            and not self._in_use(step)
        )

    def _remove_checkpoint(self, node: Node) -> None:
        self.rows.drop(node.row)
        node.row = 0
        del self._checkpoints[node]
        self.prune(node)

    def prune(self, node: Node | None) -> None:
        """Free the pages from a node upwards that no checkpoint and no sequence needs."""
        while node is not None and node.parent is not None and node.is_leaf and not node.row:
            if node.digest and self._in_use(node):
                return
            self._remove(node, node.parent)
            node = node.parent

    def _remove(self, node: Node, parent: Node) -> None:
        if node.digest:
            del self._index[node.digest], parent.children[node.digest]
        else:
            parent.tails.remove(node)
        self._nodes_on[node.page] -= 1
        self.pages.drop(node.page)


def path_to(node: Node) -> list[Node]:
    """The nodes from the first page to this one."""
    path = []
    while node.parent is not None:
        path.append(node)
        node = node.parent
    return path[::-1]


def _agree(node: Node, token_ids: Seq[int]) -> bool:
    start = node.position - len(node.token_ids)
    return node.token_ids == tuple(token_ids[start : node.position])


def _previous(node: Node) -> int:
    """The position of the deepest checkpoint before a node, on the way to it."""
    child, parent = node, node.parent
    while parent is not None:
        tails = (tail for tail in parent.tails if len(tail.token_ids) < len(child.token_ids))
        found = [t.position for t in tails if t.token_ids == child.token_ids[: len(t.token_ids)]]
        if found or parent.row:
            return max(found, default=parent.position)
        child, parent = parent, parent.parent
    return 0
