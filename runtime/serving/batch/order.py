"""Which row runs next: one that begins like the row before, to find its prefix in the cache; then the longest."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from typing import Generic, TypeVar

GROUP_TOKENS = 64  # rows that agree on so many tokens run one after the other

Row = TypeVar("Row")


class Waiting(Generic[Row]):
    """Rows that were read and not started, grouped by their first tokens.

    In a group, and among groups, the longest answers come first: they would else run alone at the
    end.
    """

    def __init__(self) -> None:
        self._groups: defaultdict[tuple[int, ...], list[tuple[int, int, Row]]] = defaultdict(list)
        self._group: tuple[int, ...] = ()

    def __len__(self) -> int:
        return sum(map(len, self._groups.values()))

    def add(self, row: Row, prompt_ids: Sequence[int], num_tokens: int, number: int) -> None:
        """A row with its prompt, the tokens that it may say, and its number in the file."""
        heapq.heappush(self._groups[tuple(prompt_ids[:GROUP_TOKENS])], (-num_tokens, number, row))

    def pop(self) -> Row:
        """The next one."""
        if self._group not in self._groups:
            self._group = min(self._groups, key=lambda name: self._groups[name][0][:2])
        group = self._groups[self._group]
        row = heapq.heappop(group)[2]
        if not group:
            del self._groups[self._group]
        return row

    def clear(self) -> list[Row]:
        """All that were left."""
        left = [row for group in self._groups.values() for _, _, row in group]
        self._groups.clear()
        return left
