"""Block-scaled weights of any format: their place in the arenas, and what they mean."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed_plan.plans.encodings import NVFP4
from tokenspeed_plan.plans.types import DType, TensorSpec
from tokenspeed_plan.runtime.execution import fp4_words, fp8_blocks


def flat(spec: TensorSpec) -> tuple[int, DType]:
    """The flat run that holds a block-scaled tensor: how many of which elements.

    FP8 is a run of its elements, NVFP4 one of 32-bit words.
    """
    size_bytes = spec.size_bytes()
    if spec.format == NVFP4:
        return size_bytes // 4, "i32"
    return size_bytes, "fp8"


def dequantise(stored: Tensor, spec: TensorSpec, dtype: torch.dtype) -> Tensor:
    """The plain tensor that a flat run stands for."""
    if spec.format == NVFP4:
        return fp4_words.dequantise(fp4_words.parts_of(stored, spec), dtype)
    return fp8_blocks.dequantise(fp8_blocks.parts_of(stored, spec), dtype)
