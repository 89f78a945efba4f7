"""The tree of the prefix cache: pages of keys and values by content, with checkpoints among them.

A node is known by the digest of its tokens chained to its parent's digest, so that equal prefixes
are equal nodes, whoever computed them. A checkpoint is a state slot that hangs at the end of a
node; one in the middle of a page hangs at a `tail`, a node of fewer tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from tokenspeed_plan.runtime.cache.ref_counts import SharedSlots

_NO_CHILDREN: dict[bytes, Node] = {}  # of each leaf; nobody writes it


@dataclass(slots=True, eq=False, init=False)
class Node:
    """A whole page with its tokens, or the first tokens of a page (a tail).

    `position` is the number of tokens up to its end. `state_slot` is the checkpoint there, 0 where
    there is none. `clock` is the cache's age when the node was last used. A node is `proven` once
    a sequence got its whole answer from what is cached up to here. Of the tokens up to its end
    `num_returned` came back from a pool that answers, after what this pool had. Few have `tails`,
    and whoever adds or removes one makes a new tuple.
    """

    parent: Node | None
    digest: bytes
    token_ids: tuple[int, ...]
    position: int
    page: int
    children: dict[bytes, Node]
    tails: tuple[Node, ...]
    state_slot: int
    clock: float
    proven: bool
    num_returned: int

    def __init__(
        self,
        parent: Node | None,
        digest: bytes,
        token_ids: tuple[int, ...],
        position: int,
        page: int,
    ) -> None:
        # Each page of each prompt is one: a generated one, with its containers, takes 1.6 x.
        self.parent = parent
        self.digest = digest
        self.token_ids = token_ids
        self.position = position
        self.page = page
        self.children = _NO_CHILDREN
        self.tails = ()
        self.state_slot = 0
        self.clock = 0.0
        self.proven = False
        self.num_returned = 0

    @property
    def is_leaf(self) -> bool:
        """Whether nothing goes on from here."""
        return not self.children and not self.tails

    def prove(self, token_ids: Seq[int]) -> None:
        """Note that a sequence of these tokens, which goes on from here, got its answer."""
        self.proven = True
        for tail in self.tails:
            tail.proven |= tail.matches(token_ids)

    def matches(self, token_ids: Seq[int]) -> bool:
        """Whether a sequence has this node's tokens at its position; digests can collide."""
        start = self.position - len(self.token_ids)
        others = tuple(token_ids[start : self.position])
        return self.token_ids == others


class PageWatch(Protocol):
    """Is told which whole pages the tree has, from inside of the engine's step."""

    def stored(self, node: Node) -> None:
        """A page was entered."""

    def removed(self, node: Node) -> None:
        """A page was given up."""


class PrefixTree:
    """All nodes; each holds its page."""

    def __init__(self, seed: bytes, pages: SharedSlots) -> None:
        self.root = Node(None, seed, (), 0, -1)
        self._watch: PageWatch | None = None
        self._pages = pages
        self._index: dict[bytes, Node] = {}
        self._nodes_on_page = [0] * len(pages.counts)
        self._whole: dict[int, Node] = {}

    def __len__(self) -> int:
        """Whole pages."""
        return len(self._index)

    def __iter__(self) -> Iterator[Node]:
        """All nodes below the root: whole pages, and tails."""
        yield from self.root.tails
        for node in self._index.values():
            yield node
            yield from node.tails

    def follow(self, watch: PageWatch) -> None:
        """Tell `watch` which whole pages there are, parents first, and each change from now on."""
        for node in self._index.values():
            watch.stored(node)
        self._watch = watch

    def find(self, digest: bytes) -> Node | None:
        """The whole page of that digest."""
        return self._index.get(digest)

    def walk(self, digests: Seq[bytes], token_ids: Seq[int]) -> Iterator[Node]:
        """The whole pages that a sequence begins with, from the root on."""
        parent = self.root
        for digest in digests:
            node = self._index.get(digest)
            if node is None or node.parent is not parent or not node.matches(token_ids):
                return
            yield node
            parent = node

    def insert_page(
        self, parent: Node, digest: bytes, token_ids: tuple[int, ...], page: int
    ) -> Node:
        """Enter a whole page."""
        position = parent.position + len(token_ids)
        node = Node(parent, digest, token_ids, position, page)
        self._index[digest] = self._whole[page] = node
        if not parent.children:
            parent.children = {}
        parent.children[digest] = node
        self._hold(node)
        if self._watch is not None:
            self._watch.stored(node)
        return node

    def insert_tail(self, parent: Node, token_ids: tuple[int, ...], page: int) -> Node:
        """The tail of these tokens; a new one, where there is none yet."""
        for tail in parent.tails:
            if tail.token_ids == token_ids:
                return tail
        position = parent.position + len(token_ids)
        tail = Node(parent, b"", token_ids, position, page)
        parent.tails += (tail,)
        self._hold(tail)
        return tail

    def prune_from(self, pages: Seq[int]) -> None:
        """Free what only the holder of pages needed, who has dropped them, the last one first."""
        for page in reversed(pages):
            node = self._whole.get(page)
            if node is not None and not (node.state_slot or node.children or node.tails):
                self.prune(node)

    def is_in_use(self, page: int) -> bool:
        """Whether a running sequence holds a page, too."""
        return self._pages.counts[page] > self._nodes_on_page[page]

    def num_freed(self, node: Node) -> int:
        """Pages that are freed with a checkpoint: those on the way to it that only it needs."""
        if node.children or node.tails:
            return 0
        # The way is as long as the prompt, and each victim costs some: no call is made on it.
        holders, num_nodes, count = self._pages.counts, self._nodes_on_page, 0
        page, parent = node.page, node.parent
        while parent is not None and holders[page] <= num_nodes[page]:
            count += 1
            if parent.state_slot or len(parent.children) + len(parent.tails) > 1:
                break
            page, parent = parent.page, parent.parent
        return count

    def prune(self, node: Node | None) -> None:
        """Free the pages from a node towards the root that no checkpoint and no sequence needs."""
        freed = []
        while node is not None and not (node.state_slot or node.children or node.tails):
            parent, page = node.parent, node.page
            if parent is None or (node.digest and self.is_in_use(page)):
                break
            self._remove(node, parent)
            freed.append(page)
            node = parent
        self._pages.drop_all(freed)

    def _hold(self, node: Node) -> None:
        self._pages.share(node.page)
        self._nodes_on_page[node.page] += 1

    def _remove(self, node: Node, parent: Node) -> None:
        if node.digest:
            del self._index[node.digest], parent.children[node.digest], self._whole[node.page]
            if self._watch is not None:
                self._watch.removed(node)
        else:
            parent.tails = tuple(tail for tail in parent.tails if tail is not node)
        self._nodes_on_page[node.page] -= 1


def path_to(node: Node) -> list[Node]:
    """The nodes from the first page to this one."""
    path = []
    while node.parent is not None:
        path.append(node)
        node = node.parent
    return path[::-1]


def previous_checkpoint(node: Node) -> int:
    """The position of the deepest checkpoint before a node, on the way to it."""
    child, parent = node, node.parent
    while parent is not None:
        if parent.tails:  # few pages have any
            first = child.token_ids[0]  # most tails of the root begin with another one
            positions = [
                tail.position
                for tail in parent.tails
                if tail.token_ids[0] == first and _begins_with(child, tail)
            ]
            if positions:
                return max(positions)
        if parent.state_slot:
            return parent.position
        child, parent = parent, parent.parent
    return 0


def _begins_with(node: Node, tail: Node) -> bool:
    """Whether the tokens of a node go on after those of a tail beside it."""
    length = len(tail.token_ids)
    if length >= len(node.token_ids):
        return False
    return tail.token_ids == node.token_ids[:length]
