"""Matrices in NVFP4: how they lie in memory, and what they mean.

An element is e2m1, times the e4m3 scale of its group of 16 elements of a row, times the fp32 factor
of its row. A matrix is one flat run of 32-bit words: first the elements, eight a word; behind them
the factors of all rows; behind those the scales.

A run of 128 elements of a row is 16 words. Four bits of each word belong to one group: element i of
group j of the run has the bits from 4 j on of word i. So a kernel takes the elements of a group out
of 16 words with the same shift, and x in the order in which it lies.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tokenspeed_plan.plans.encodings import E2M1_MAX, GROUP
from tokenspeed_plan.plans.fp8_format import E4M3_MAX
from tokenspeed_plan.plans.types import FP4_UNIT, TensorSpec

_RUN = FP4_UNIT[1]
_GROUPS = _RUN // GROUP  # of a run, and elements of a word
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of e2m1, by its last three bits
_SIGN = 8


class Fp4(NamedTuple):
    """Views of a matrix in NVFP4.

    Attributes:
        elements: bytes of words, uint8 [..., rows, columns / 2].
        factors: fp32 [..., rows].
        scales: e4m3 [..., rows, columns / 16].
    """

    elements: Tensor
    factors: Tensor
    scales: Tensor


def parts_of(stored: Tensor, spec: TensorSpec) -> Fp4:
    """The parts of a flat run of words; nothing is copied."""
    *rows, columns = spec.bind(0, 0)
    num_rows = math.prod(rows)
    num_words = num_rows * columns * 4 // 32
    elements = stored[:num_words].view(torch.uint8).view(*rows, columns // 2)
    factors = stored[num_words : num_words + num_rows].view(torch.float32).view(*rows)
    scales = stored[num_words + num_rows :].view(torch.float8_e4m3fn)
    return Fp4(elements, factors, scales.view(*rows, columns // GROUP))


def to_words(stored: Tensor) -> Tensor:
    """Bytes of a checkpoint, where byte i of a row has its elements 2 i and 2 i + 1, as words.

    Args:
        stored: uint8 [..., columns / 2].

    Returns:
        The same number of bytes, in the order in which they lie in memory.
    """
    nibbles = torch.stack((stored & 15, stored >> 4), -1).flatten(-2)
    pairs = nibbles.unflatten(-1, (-1, _GROUPS // 2, 2, GROUP))
    packed = pairs[..., 0, :] | pairs[..., 1, :] << 4  # [..., run, byte of the word, word]
    words: Tensor = packed.transpose(-1, -2).reshape(stored.shape)
    return words


def _codes(elements: Tensor) -> Tensor:
    """The e2m1 of each element in the order of the row, [..., columns]: the inverse of `to_words`.

    Args:
        elements: bytes of words.
    """
    packed = elements.unflatten(-1, (-1, GROUP, _GROUPS // 2)).transpose(-1, -2)
    # [..., run, byte of the word, 2, word]
    codes: Tensor = torch.stack((packed & 15, packed >> 4), -2).flatten(-4)
    return codes


def dequantise(parts: Fp4, dtype: torch.dtype) -> Tensor:
    """Element times scale times factor, computed in fp32 (fp64 where that is wanted)."""
    wide = torch.float32
    if dtype == torch.float64:
        wide = dtype
    signed = (*_VALUES, *(-value for value in _VALUES))
    table = torch.tensor(signed, dtype=wide, device=parts.elements.device)
    values: Tensor = table[_codes(parts.elements).long()].unflatten(-1, (-1, GROUP))
    values *= parts.scales.to(wide)[..., None]
    return (values.flatten(-2) * parts.factors.to(wide)[..., None]).to(dtype)


class Stored(NamedTuple):
    """A matrix as a checkpoint has it: two elements a byte, e4m3 scales, and one fp32 factor."""

    elements: Tensor
    scales: Tensor
    factor: Tensor


def quantise(matrix: Tensor, largest: float) -> Stored:
    """Round a matrix to the nearest NVFP4.

    The factor is `largest` / (6 * 448), the scale of a group its largest element / 6, divided by
    the factor and rounded to e4m3; elements are divided by what is stored
    (NVIDIA, arXiv:2509.25149).

    Args:
        matrix: [rows, columns], finite; the columns a multiple of 16.
        largest: the largest size of an element, of this matrix and of those that share its factor.
    """
    wide = matrix.float().unflatten(-1, (-1, GROUP))
    factor = torch.tensor(largest / (E2M1_MAX * E4M3_MAX) or 1.0)
    wanted = wide.abs().amax(-1) / E2M1_MAX / factor
    scales = wanted.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    divisor = (scales.float() * factor)[..., None]
    scaled = torch.where(divisor > 0, wide / divisor, 0.0)
    codes = _nearest(scaled.abs()) | (scaled < 0).to(torch.uint8) * _SIGN
    low, high = codes.flatten(-2).unflatten(-1, (-1, 2)).unbind(-1)
    return Stored(low | high << 4, scales, factor)


def _nearest(sizes: Tensor) -> Tensor:
    """The e2m1 next to each size; halfway between two, the one whose last bit is 0."""
    bounds = []
    for code in range(len(_VALUES) - 1):
        middle = torch.tensor((_VALUES[code] + _VALUES[code + 1]) / 2)
        if code % 2:  # a tie goes up
            middle = torch.nextafter(middle, torch.tensor(0.0))
        bounds.append(middle)
    return torch.searchsorted(torch.stack(bounds), sizes.contiguous()).to(torch.uint8)
