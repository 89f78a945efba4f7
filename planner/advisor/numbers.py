"""Rounding and division that every file of the advisor uses."""

from __future__ import annotations


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
