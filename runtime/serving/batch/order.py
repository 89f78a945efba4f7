"""Which row starts next: rows that share a prefix follow each other, to hit the prefix cache."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

GROUP_TOKENS = 64  # rows whose first tokens agree this far start one after the other

Row = TypeVar("Row")
Prefix = tuple[int, ...]


class _Entry(NamedTuple, Generic[Row]):
    """A row of a group; the smallest entry starts first. No two rows have one number."""

    minus_max_tokens: int
    number: int
    row: Row

    @property
    def rank(self) -> tuple[int, int]:
        """Its order among the first entries of all groups."""
        return self.minus_max_tokens, self.number


class Waiting(Generic[Row]):
    """Rows that were read and not started, grouped by their first tokens.

    Within a group and among groups, rows with the longest answers start first, so that none of them
    runs alone at the end.
    """

    def __init__(self) -> None:
        self._groups: defaultdict[Prefix, list[_Entry[Row]]] = defaultdict(list)
        self._current: Prefix = ()

    def __len__(self) -> int:
        return sum(len(group) for group in self._groups.values())

    def add(self, row: Row, prompt_ids: Sequence[int], max_tokens: int, number: int) -> None:
        """Add a row: its prompt, the most tokens it may generate, its number in the file."""
        prefix = tuple(prompt_ids[:GROUP_TOKENS])
        heapq.heappush(self._groups[prefix], _Entry(-max_tokens, number, row))

    def pop(self) -> Row:
        """Remove and return the row that starts next."""
        if self._current not in self._groups:
            self._current = min(self._groups, key=self._rank)
        group = self._groups[self._current]
        entry = heapq.heappop(group)
        is_last = not group
        if is_last:
            del self._groups[self._current]
        return entry.row

    def clear(self) -> list[Row]:
        """Remove and return all rows."""
        rows = []
        for group in self._groups.values():
            for entry in group:
                rows.append(entry.row)
        self._groups.clear()
        return rows

    def _rank(self, prefix: Prefix) -> tuple[int, int]:
        return self._groups[prefix][0].rank
