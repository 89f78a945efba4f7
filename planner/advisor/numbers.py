"""Rounding and division that every file of the advisor uses."""

from __future__ import annotations

from collections.abc import Callable


def digits(value: float) -> float:
    """Round to five significant digits: more would be noise, and would differ between machines."""
    return float(f"{value:.5g}")


def ceil_div(value: int, divisor: int) -> int:
    """Integer division, rounded up."""
    return -(-value // divisor)


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, ... up to the limit."""
    num_bits = limit.bit_length()
    return [1 << bits for bits in range(num_bits)]


def most_within(limit: float, taken: Callable[[int], float], least: int, most: int) -> int:
    """A large number from `least` to `most` that takes at most the limit; else the least.

    What is taken grows with the number, if not evenly (tiles are padded): so halve until it is
    within the limit, and then look between that and its double.
    """
    low, high = most, most
    while low > least and taken(low) > limit:
        low, high = max(low // 2, least), low - 1
    while low < high:
        middle = (low + high + 1) // 2
        if taken(middle) <= limit:
            low = middle
        else:
            high = middle - 1
    return low
