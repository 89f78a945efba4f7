"""Tensors in blocks of FP8: the elements, and behind them in the same bytes their factors.

A block-scaled tensor is one flat run of FP8 elements. First come the elements of `spec.shape`, row
by row; behind them, as fp32, a factor for each block: of 128 x 128 in weights, of 128 columns of a
row in activations. Kernels take its address alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tokenspeed_plan.plans.fp8_format import BLOCK, E4M3_MAX, MIN_AMAX
from tokenspeed_plan.plans.types import TensorSpec


class Scaled(NamedTuple):
    """Views of a block-scaled tensor: elements, and fp32 factors of their blocks."""

    elements: Tensor
    scales: Tensor


def parts_of(stored: Tensor, spec: TensorSpec) -> Scaled:
    """The elements and the factors of a flat run of FP8; nothing is copied."""
    block_rows, block_columns = spec.format.block
    *stack, rows, columns = _shape(stored, spec)
    count = math.prod((*stack, rows, columns))
    scales = stored[count:].view(torch.float32)
    return Scaled(
        stored[:count].view(*stack, rows, columns),
        scales.view(*stack, rows // block_rows, columns // block_columns),
    )


def _shape(stored: Tensor, spec: TensorSpec) -> tuple[int, ...]:
    """The shape of a weight, or of as many rows of activations as there are bytes of."""
    columns = spec.bind(0, 0)[-1]
    if isinstance(spec.shape[0], int):
        return spec.bind(0, 0)
    row_bytes = columns * spec.format.bytes_per_element
    return int(stored.numel() / row_bytes), columns


def dequantise(parts: Scaled, dtype: torch.dtype) -> Tensor:
    """Each element times the factor of its block, computed in fp32 (fp64 where that is wanted)."""
    wide = torch.float32
    if dtype == torch.float64:
        wide = dtype
    *stack, rows, columns = parts.elements.shape
    runs = parts.scales.shape[-2]
    split = (*stack, runs, rows // max(runs, 1), columns // BLOCK, BLOCK)
    values = parts.elements.to(wide).view(split)
    factors = parts.scales.to(wide)[..., :, None, :, None]
    return (values * factors).view(*stack, rows, columns).to(dtype)


def quantise_rows(x: Tensor) -> Tensor:
    """Activations as a flat run of FP8, with amax / 448 as the factor of 128 columns of a row.

    Elements are multiplied by 448 / amax and rounded to nearest. What is not finite becomes NaN.
    """
    wide = x.float().unflatten(-1, (-1, BLOCK))
    largest = wide.abs().amax(-1, keepdim=True).clamp(min=MIN_AMAX)
    scales = largest / E4M3_MAX
    # PyTorch divides a number by a tensor in two roundings, a tensor by a tensor in one.
    inverses = torch.full_like(largest, E4M3_MAX) / largest
    values = (wide * inverses).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return flat_run(Scaled(values, scales))


def flat_run(parts: Scaled) -> Tensor:
    """Elements and factors as they are stored, one behind the other."""
    flat = [part.contiguous().flatten().view(torch.uint8) for part in parts]
    return torch.cat(flat).view(torch.float8_e4m3fn)


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
