"""Which checkpoint the prefix cache evicts.

It is the one that costs the fewest tokens to compute again per byte that it frees, with the ageing
of GreedyDual (Cao and Irani, Cost-Aware WWW Proxy Caching Algorithms, USENIX 1997). Without
recurrent state it is the least recently used one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from tokenspeed_plan.runtime.cache.prefix_tree import (
    Node,
    PrefixTree,
    path_to,
    previous_checkpoint,
)
from tokenspeed_plan.runtime.cache.ref_counts import SharedSlots


@dataclass(slots=True)
class Checkpoints:
    """The checkpoints of a tree, the oldest first.

    Attributes:
        page_bytes: what an evicted page frees.
        slot_bytes: what an evicted state slot frees; 0 in a model without recurrent state.
        clock: the age of the cache; it rises to the worth of what is evicted.
    """

    tree: PrefixTree
    state_slots: SharedSlots
    page_bytes: int
    slot_bytes: int
    clock: float = 0.0
    nodes: OrderedDict[Node, None] = field(default_factory=OrderedDict)

    @property
    def has_state(self) -> bool:
        """Whether the model has recurrent state; else a slot is a mere number, without memory."""
        return self.slot_bytes > 0

    def add(self, node: Node, state_slot: int) -> None:
        """Enter a state slot at a node; where it has one already, that one stays."""
        if not node.state_slot:
            node.state_slot = self.state_slots.share(state_slot)
            self.nodes[node] = None
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

        With recurrent state it does nothing: `clock` has the time of the last use.
        """
        if self.has_state:
            return
        for step in reversed(path_to(node)):
            if step.state_slot:
                self.nodes.move_to_end(step)

    def evict(self, is_useful: Callable[[Node], bool]) -> bool:
        """Evict a checkpoint that nobody reads and that `is_useful`; False where there is none."""
        victim = self._victim(is_useful)
        if victim is None:
            return False
        self.remove(victim)
        return True

    def _victim(self, is_useful: Callable[[Node], bool]) -> Node | None:
        """The checkpoint to give up; sets the age of the cache without it."""
        candidates = (
            node
            for node in self.nodes
            if self.state_slots.holders(node.state_slot) == 1 and is_useful(node)
        )
        if not self.has_state:
            return next(candidates, None)
        worth = {node: self._worth(node) for node in candidates}
        if not worth:
            return None
        victim = min(worth, key=worth.__getitem__)
        self.clock = worth[victim]
        return victim

    def frees_a_page(self, node: Node) -> bool:
        """Whether a page becomes free with a checkpoint."""
        return node.is_leaf and not self.tree.is_in_use(node.page)

    def remove(self, node: Node) -> None:
        """Give up a checkpoint, and the pages that only it needed."""
        self.state_slots.drop(node.state_slot)
        node.state_slot = 0
        del self.nodes[node]
        self.tree.prune(node)

    def _worth(self, node: Node) -> float:
        """Tokens to compute again per byte that is freed, on top of the age at its last use."""
        freed_bytes, step = self.slot_bytes, node
        while step.parent is not None and self._goes_with(step, node):
            freed_bytes += self.page_bytes
            step = step.parent
        return node.clock + (node.position - previous_checkpoint(node)) / freed_bytes

    def _goes_with(self, step: Node, node: Node) -> bool:
        """Whether the page of `step`, a node on the way to a checkpoint, is freed with it."""
        if step is not node and step.state_slot:
            return False
        num_below = len(step.children) + len(step.tails)
        on_the_way = int(step is not node)
        return num_below <= on_the_way and not self.tree.is_in_use(step.page)
