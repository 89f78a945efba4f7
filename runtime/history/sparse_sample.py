"""Some of a stream of values, evenly spread over it, in bounded memory."""

from __future__ import annotations

from typing import Generic, TypeVar

Value = TypeVar("Value")


class SparseSample(Generic[Value]):
    """Every value at first; every second, fourth, ... of all, once there are many.

    Args:
        most: values that are kept.

    Attributes:
        count: values that came.
        values: those that are kept, in their order.
    """

    def __init__(self, most: int) -> None:
        self.count = 0
        self.values: list[Value] = []
        self._most = most
        self._stride = 1

    def is_due(self) -> bool:
        """Count a value; returns whether it is to be kept."""
        place = self.count
        self.count = place + 1
        return place % self._stride == 0

    def keep(self, value: Value) -> None:
        """Keep the value that was counted last."""
        self.values.append(value)
        if len(self.values) > self._most:
            del self.values[1::2]
            self._stride *= 2

    def add(self, value: Value) -> None:
        """Count a value, and keep it where it is due."""
        if self.is_due():
            self.keep(value)
