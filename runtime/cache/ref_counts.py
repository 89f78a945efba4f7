"""Numbered slots of one kind (pages or state slots), each with a count of its holders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class SharedSlots:
    """Slots with reference counts: a slot is free again when its last holder drops it.

    Attributes:
        counts: the holders of each slot, by its number; 0 where there is no such slot.
    """

    def __init__(self, slots: Iterable[int]) -> None:
        self._slots = tuple(slots)
        self.counts = [0] * (max(self._slots, default=0) + 1)
        self._free = list(reversed(self._slots))

    @property
    def num_free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    @property
    def free(self) -> list[int]:
        """The slots that nobody holds."""
        return list(self._free)

    def __iter__(self) -> Iterator[int]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def holders(self, slot: int) -> int:
        """Number of holders of a slot."""
        return self.counts[slot]

    def take(self) -> int:
        """A free slot, now held once.

        It is the one that was freed last, as it may still be in a cache of the device.
        """
        slot = self._free.pop()
        self.counts[slot] = 1
        return slot

    def take_some(self, most: int) -> list[int]:
        """Up to so many free slots, each now held once, in the order in which `take` gives them."""
        free = self._free
        found = free[: -most - 1 : -1]
        del free[len(free) - len(found) :]
        for slot in found:
            self.counts[slot] = 1
        return found

    def share(self, slot: int) -> int:
        """Add a holder to a slot that is held."""
        assert self.counts[slot] > 0, f"slot {slot} is free and cannot be shared"
        self.counts[slot] += 1
        return slot

    def drop(self, slot: int) -> None:
        """Remove a holder of a slot."""
        self.drop_all((slot,))

    def drop_all(self, slots: Iterable[int]) -> None:
        """Remove a holder of each of some slots."""
        holders, free = self.counts, self._free
        for slot in slots:
            left = holders[slot] - 1
            assert left >= 0, f"slot {slot} is free already"
            holders[slot] = left
            if not left:
                free.append(slot)
