"""The angles of the rotary embedding, baked into the kernel as numbers."""

from __future__ import annotations

import math


def frequencies(
    rotary_dim: int, theta: float, factor: float, original: int
) -> tuple[list[float], float]:
    """Radians a position for each pair, and the factor on cos and sin (YaRN, arXiv:2309.00071, where factor > 1)."""
    inverse = [theta ** -(2 * i / rotary_dim) for i in range(rotary_dim // 2)]
    if factor == 1.0:
        return inverse, 1.0

    def pair_at(rotations: float) -> float:
        return rotary_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(pair_at(32.0)), 0), min(math.ceil(pair_at(1.0)), rotary_dim - 1)
    ramp = [min(max((i - low) / max(high - low, 0.001), 0.0), 1.0) for i in range(rotary_dim // 2)]
    stretched = [
        value / factor * r + value * (1 - r) for value, r in zip(inverse, ramp, strict=True)
    ]
    return stretched, 0.1 * math.log(factor) + 1.0
