"""Places of one kind (pages, or rows of state), each with a count of those who hold it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class Pool:
    """A place is free, or held by one or by several; it is free again when the last of them drops it."""

    def __init__(self, places: Iterable[int]) -> None:
        self._holders = dict.fromkeys(places, 0)
        self._free = list(reversed(self._holders))

    @property
    def num_free(self) -> int:
        """Places that nobody holds."""
        return len(self._free)

    def __iter__(self) -> Iterator[int]:
        return iter(self._holders)

    def __len__(self) -> int:
        return len(self._holders)

    def holders(self, place: int) -> int:
        """How many hold a place."""
        return self._holders[place]

    def take(self) -> int:
        """A free place, held by the caller alone; the one that was freed last, as it may still be in a cache."""
        place = self._free.pop()
        self._holders[place] = 1
        return place

    def share(self, place: int) -> int:
        """One more holds a place that is held already."""
        assert self._holders[place] > 0, f"place {place} is free and cannot be shared"
        self._holders[place] += 1
        return place

    def drop(self, place: int) -> None:
        """One holder less."""
        assert self._holders[place] > 0, f"place {place} is free already"
        self._holders[place] -= 1
        if not self._holders[place]:
            self._free.append(place)
