"""In which order rows start: those that begin alike one after the other, so that they meet in the prefix cache."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Group(Generic[T]):
    """Rows with the same first tokens, as a heap in the order of their prompts: the more alike, the closer."""

    rows: list[tuple[tuple[int, ...], int, int, T]] = field(default_factory=list)  # prompt, -tokens, line, row

    @property
    def rank(self) -> tuple[int, int]:
        """Longest answers first: they would else run alone at the end; then the order of the input."""
        return min((tokens, line) for _, tokens, line, _ in self.rows)


class Backlog(Generic[T]):
    """Rows that have not started. A group is one of rows that share at least `min_shared_tokens` (0: none do)."""

    def __init__(self, min_shared_tokens: int) -> None:
        self._least = min_shared_tokens
        self._groups: dict[tuple[int, ...], _Group[T]] = {}
        self._current: tuple[int, ...] = ()

    def __len__(self) -> int:
        return sum(len(group.rows) for group in self._groups.values())

    def __iter__(self) -> Iterator[T]:
        return (row for group in self._groups.values() for *_, row in group.rows)

    def add(self, row: T, prompt_ids: tuple[int, ...], num_tokens: int, line: int) -> None:
        """A row that will say up to `num_tokens` tokens."""
        alike = self._least and len(prompt_ids) > self._least
        key = prompt_ids[: self._least] if alike else (-line,)  # no token is negative: a group of its own
        group = self._groups.setdefault(key, _Group())
        heapq.heappush(group.rows, (prompt_ids if alike else (), -num_tokens, line, row))

    def pop(self) -> T:
        """The next row: of the group at hand, while it has any."""
        if self._current not in self._groups:
            self._current = min(self._groups, key=lambda key: self._groups[key].rank)
        group = self._groups[self._current]
        *_, row = heapq.heappop(group.rows)
        if not group.rows:
            del self._groups[self._current]
        return row

    def clear(self) -> None:
        """Forget all."""
        self._groups.clear()
