"""Which checkpoint the prefix cache evicts.

It is the one that costs the fewest tokens to compute again per byte that it frees, with the ageing
of GreedyDual (Cao and Irani, Cost-Aware WWW Proxy Caching Algorithms, USENIX 1997). Without
recurrent state, and on the host, it is the least recently used one.

Of many checkpoints the worth is not computed again for each victim: a heap has what it was. It
mostly rises, and the one on top is computed again before it goes. Where it has fallen, as others
went, that is seen when the heap is made anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from operator import itemgetter

from tokenspeed_plan.runtime.cache.prefix_tree import (
    Node,
    PrefixTree,
    path_to,
    previous_checkpoint,
)
from tokenspeed_plan.runtime.cache.ref_counts import SharedSlots

FEW = 32  # of so many checkpoints each one that can go is looked at for each victim


@dataclass(slots=True)
class Checkpoints:
    """The checkpoints of a tree, the oldest first.

    Attributes:
        page_bytes: what an evicted page frees.
        slot_bytes: what an evicted state slot frees; 0 in a model without recurrent state.
        oldest_first: whether the least recently used one is evicted in any model.
        clock: the age of the cache; it rises to the worth of what is evicted.
    """

    tree: PrefixTree
    state_slots: SharedSlots
    page_bytes: int
    slot_bytes: int
    oldest_first: bool = False
    clock: float = 0.0
    nodes: OrderedDict[Node, None] = field(default_factory=OrderedDict)
    # worth when it was computed, number, checkpoint; those that were no candidates when they came
    # to the top; and for how many victims all of it is used still
    _heap: list[tuple[float, int, Node]] = field(default_factory=list)
    _passed: list[tuple[float, int, Node]] = field(default_factory=list)
    _num_entered: int = 0
    _num_victims_left: int = 0

    @property
    def has_state(self) -> bool:
        """Whether the model has recurrent state; else a slot is a mere number, without memory."""
        return self.slot_bytes > 0

    @property
    def weighs(self) -> bool:
        """Whether what is worth least is evicted, else what was not used for longest."""
        return self.has_state and not self.oldest_first

    def add(self, node: Node, state_slot: int) -> None:
        """Enter a state slot at a node; where it has one already, that one stays."""
        if not node.state_slot:
            node.state_slot = self.state_slots.share(state_slot)
            self.nodes[node] = None
            if self.has_state:
                node.proven = False  # of this state nobody has got an answer yet
            if self.weighs:
                self._enter(self.clock, node)  # less than it is worth
        node.clock = self.clock

    def add_hit_point(self, node: Node, state_slot: int) -> None:
        """Let requests start at the end of a page without state; takes over the slot."""
        node.state_slot = state_slot
        self.nodes[node] = None

    def use(self, node: Node) -> None:
        """Hold a checkpoint for a sequence that goes on from it."""
        if node.state_slot:
            self.state_slots.share(node.state_slot)
            node.clock = self.clock
        self.touch(node)

    def touch(self, node: Node) -> None:
        """Note that the pages up to a node were used; the deepest of them is evicted first.

        Where checkpoints are weighed it does nothing: `clock` has the time of the last use.
        """
        if self.weighs:
            return
        for step in reversed(path_to(node)):
            if step.state_slot:
                self.nodes.move_to_end(step)

    def evict(self, is_useful: Callable[[Node], bool]) -> bool:
        """Evict a checkpoint that nobody reads and that `is_useful`; False where there is none."""
        victim = self._victim(is_useful)
        if victim is None:
            return False
        self.forget(victim)
        return True

    def _victim(self, is_useful: Callable[[Node], bool]) -> Node | None:
        """The checkpoint to give up; sets the age of the cache without it."""

        def is_candidate(node: Node) -> bool:
            return self.state_slots.counts[node.state_slot] == 1 and is_useful(node)

        if not self.weighs:
            return next(filter(is_candidate, self.nodes), None)
        if len(self.nodes) <= FEW:
            self._heap, self._passed, self._num_victims_left = [], [], 0
            worths = [(self._worth(node), node) for node in self.nodes if is_candidate(node)]
            if not worths:
                return None
            self.clock, victim = min(worths, key=itemgetter(0))
            return victim
        if not self._num_victims_left:
            self._rebuild()
        self._num_victims_left -= 1
        return self._cheapest(is_candidate)

    def _rebuild(self) -> None:
        """Compute the worth of all checkpoints; it is used for a quarter as many victims."""
        self._heap, self._passed = [], []
        self._num_entered = 0
        for node in self.nodes:
            self._enter(self._worth(node), node)
        self._num_victims_left = len(self.nodes) // 4 + 1

    def _enter(self, worth: float, node: Node) -> None:
        """Note what a checkpoint is worth at least; of equal ones the oldest goes first."""
        heappush(self._heap, (worth, self._num_entered, node))
        self._num_entered += 1

    def _cheapest(self, is_candidate: Callable[[Node], bool]) -> Node | None:
        """The candidate on top of the heap, with its worth of now.

        Most that are no candidates stay so for long: they are looked at, but do not come back.
        """
        passed, self._passed = self._passed, []
        for entry in passed:
            if entry[2] in self.nodes:
                self._put(entry, is_candidate(entry[2]))
        while self._heap:
            entry = heappop(self._heap)
            known, number, node = entry
            if node not in self.nodes:
                continue
            if not is_candidate(node):
                self._put(entry, False)
                continue
            worth = self._worth(node)
            if worth <= known:
                self.clock = worth
                return node
            heappush(self._heap, (worth, number, node))
        return None

    def _put(self, entry: tuple[float, int, Node], is_candidate: bool) -> None:
        if is_candidate:
            heappush(self._heap, entry)
        else:
            self._passed.append(entry)

    def frees_a_page(self, node: Node) -> bool:
        """Whether a page becomes free with a checkpoint."""
        return not (node.children or node.tails or self.tree.is_in_use(node.page))

    def forget(self, node: Node) -> None:
        """Give up a checkpoint, and the pages that only it needs."""
        self.state_slots.drop(node.state_slot)
        node.state_slot = 0
        del self.nodes[node]
        self.tree.prune(node)

    def _worth(self, node: Node) -> float:
        """Tokens to compute again per byte that is freed, on top of the age at its last use."""
        freed_bytes = self.slot_bytes + self.tree.num_freed(node) * self.page_bytes
        return node.clock + (node.position - previous_checkpoint(node)) / freed_bytes
