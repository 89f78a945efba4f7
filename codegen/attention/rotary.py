"""The angles of the rotary embedding, baked into the kernel as numbers."""

from __future__ import annotations

import math

FAST_ROTATIONS = 32.0  # pairs that turn as often within the original length keep their frequency
SLOW_ROTATIONS = 1.0  # pairs that turn no more than this are stretched by the whole factor


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
    inverse = [theta ** -(2 * i / rotary_dim) for i in pairs]
    if factor == 1.0:
        return inverse, 1.0
    low = max(math.floor(_pair_at(FAST_ROTATIONS, rotary_dim, theta, original)), 0)
    high = min(math.ceil(_pair_at(SLOW_ROTATIONS, rotary_dim, theta, original)), rotary_dim - 1)
    width = max(high - low, 0.001)
    stretched = []
    for i in pairs:
        share = min(max((i - low) / width, 0.0), 1.0)
        stretched.append(inverse[i] / factor * share + inverse[i] * (1 - share))
    return stretched, 0.1 * math.log(factor) + 1.0


def _pair_at(rotations: float, rotary_dim: int, theta: float, original: int) -> float:
    """The pair, as a fraction, that turns so often within the original context."""
    wavelengths = original / (rotations * 2 * math.pi)
    return rotary_dim * math.log(wavelengths) / (2 * math.log(theta))
