"""Matrices in blocks of FP8: the elements, and behind them in the same bytes their factors.

A block-scaled tensor is one flat run of FP8 elements. First come the elements of `spec.shape`, row
by row; behind them, as fp32, a factor for each block of 128 x 128. Kernels take its address alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tokenspeed_plan.plans.fp8_format import BLOCK, E4M3_MAX, blocks
from tokenspeed_plan.plans.types import TensorSpec


class Scaled(NamedTuple):
    """Views of a block-scaled tensor: elements, and fp32 factors of their blocks."""

    elements: Tensor
    scales: Tensor


def parts_of(stored: Tensor, spec: TensorSpec) -> Scaled:
    """The elements and the factors of a flat run of FP8; nothing is copied."""
    shape = spec.bind(0, 0)
    count = math.prod(shape)
    scales = stored[count:].view(torch.float32)
    return Scaled(stored[:count].view(shape), scales.view(blocks(shape)))


def dequantise(parts: Scaled, dtype: torch.dtype) -> Tensor:
    """Each element times the factor of its block, computed in fp32 (fp64 where that is wanted)."""
    wide = torch.float32
    if dtype == torch.float64:
        wide = dtype
    *stack, rows, columns = parts.elements.shape
    split = (*stack, -1, BLOCK, columns // BLOCK, BLOCK)
    values = parts.elements.to(wide).view(split)
    factors = parts.scales.to(wide)[..., :, None, :, None]
    return (values * factors).view(*stack, rows, columns).to(dtype)


def quantise_blocks(matrix: Tensor, scale_dtype: torch.dtype = torch.float32) -> Scaled:
    """Round a matrix to the nearest FP8, with amax / 448 as the factor of each block.

    The factor is rounded to `scale_dtype` first, and elements are divided by what is stored. Blocks
    at the edges may be smaller. A block of zeros has the factor 1.

    Args:
        matrix: [..., rows, columns], finite.
        scale_dtype: of the factors.

    Returns:
        Elements of the same shape, and the factors.
    """
    wide = matrix.float()
    rows, columns = wide.shape[-2:]
    padding = (0, -columns % BLOCK, 0, -rows % BLOCK)
    padded = torch.nn.functional.pad(wide, padding)
    tiled = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    largest = tiled.abs().amax((-3, -1))
    scales = (largest / E4M3_MAX).to(scale_dtype)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    values = tiled / scales.float()[..., :, None, :, None]
    values = values.clamp(-E4M3_MAX, E4M3_MAX).reshape(padded.shape)
    elements = values[..., :rows, :columns].to(torch.float8_e4m3fn)
    return Scaled(elements.contiguous(), scales)
