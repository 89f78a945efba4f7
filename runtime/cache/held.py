"""A checkpoint of a prefix cache that somebody holds for a while: its pages, and its state slot."""

from __future__ import annotations

from dataclasses import dataclass

from tokenspeed_plan.runtime.cache.prefix_cache import Hit, PrefixCache
from tokenspeed_plan.runtime.cache.prefix_tree import Node


@dataclass(slots=True, eq=False)
class Held:
    """Pages and a state slot that a copy needs; `node` is the last whole page that is cached."""

    cache: PrefixCache
    node: Node
    pages: list[int]
    state_slot: int = 0

    @classmethod
    def of(cls, cache: PrefixCache, checkpoint: Node) -> Held:
        """What a checkpoint consists of, the page of a tail included."""
        node, pages = cache.use(Hit(checkpoint, checkpoint.position))
        if node is not checkpoint:
            pages.append(cache.pages.share(checkpoint.page))
        return cls(cache, node, pages, checkpoint.state_slot)

    def drop(self) -> None:
        """Give all of it back."""
        self.cache.drop_pages(self.pages)
        if self.state_slot:
            self.cache.state_slots.drop(self.state_slot)
