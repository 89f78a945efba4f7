"""The angles of the rotary embedding, baked into the kernel as numbers."""

from __future__ import annotations

import math

# Pairs that turn at least this often within the original context keep their frequency.
FAST_ROTATIONS = 32.0
# Pairs that turn at most this often are stretched by the whole factor.
SLOW_ROTATIONS = 1.0


def frequencies(
    rotary_dim: int, theta: float, factor: float, original: int
) -> tuple[list[float], float]:
    """Frequencies of the rotary embedding, stretched by YaRN (arXiv:2309.00071) where factor > 1.

    Args:
        rotary_dim: dimensions of a head that are rotated; two make a pair.
        theta: base of the frequencies.
        factor: the new context length over the original one.
        original: tokens of the original context.

    Returns:
        Radians a position for each pair, and the factor on cos and sin.
    """
    pairs = range(rotary_dim // 2)
    plain = [theta ** -(2 * pair / rotary_dim) for pair in pairs]
    if factor == 1.0:
        return plain, 1.0
    first = _pair_at(FAST_ROTATIONS, rotary_dim, theta, original)
    low = max(math.floor(first), 0)
    last = _pair_at(SLOW_ROTATIONS, rotary_dim, theta, original)
    high = min(math.ceil(last), rotary_dim - 1)
    width = max(high - low, 0.001)
    stretched = []
    for pair, frequency in enumerate(plain):
        position = (pair - low) / width
        share = min(max(position, 0.0), 1.0)
        slow = frequency / factor * share
        fast = frequency * (1 - share)
        stretched.append(slow + fast)
    scale = 0.1 * math.log(factor) + 1.0
    return stretched, scale


def _pair_at(rotations: float, rotary_dim: int, theta: float, original: int) -> float:
    """The pair, as a fraction, that turns so often within the original context."""
    radians = rotations * 2 * math.pi
    wavelength = original / radians
    pairs = rotary_dim * math.log(wavelength)
    return pairs / (2 * math.log(theta))
