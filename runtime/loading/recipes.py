"""How a checkpoint is quantised: which matrices, into which tensors, and what its config says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenspeed_plan.plans.encodings import (
    GROUP,
    NVFP4_ENCODINGS,
    Encoding,
    elements_name,
    factor_name,
    scales_name,
)
from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.plans.fp8_format import BLOCK, E4M3_MAX, is_fp8_matrix, module_of
from tokenspeed_plan.plans.nvfp4_recipe import MIXED, NVFP4_WORDS, recipe_encoding
from tokenspeed_plan.plans.types import FP4_UNIT
from tokenspeed_plan.runtime.execution import fp4_words
from tokenspeed_plan.runtime.execution.fp8_blocks import quantise_blocks

_SCALE_DTYPE = torch.bfloat16  # of FP8 blocks, as published
_EXPERTS = ".mlp.experts"
_LAYER: dict[Encoding, dict[str, Any]] = {
    "nvfp4": {"group_size": GROUP, "quant_algo": "W4A16_NVFP4"},
    "fp8_tensor": {"quant_algo": "FP8"},
}


class Recipe(Protocol):
    """What is made of each matrix of a checkpoint."""

    def encoding(self, name: str) -> Encoding | None:
        """Of the tensor of this name; None where it stays as it is."""

    def quantise(self, name: str, matrix: Tensor, largest: float) -> dict[str, Tensor]:
        """The tensors of a matrix; `largest` is its largest size, and that of its other half."""

    def config(self, kept: Iterable[str], made: Mapping[str, Encoding]) -> dict[str, Any]:
        """`quantization_config`, from the modules that were kept, and those that were not."""


def find_recipe(word: str, has_experts: bool) -> Recipe:
    """The recipe of a word of `tokenspeed quantize --to`.

    Raises:
        RequestError: there is none.
    """
    if word == "fp8":
        return Fp8Recipe()
    if word in NVFP4_WORDS:
        return Nvfp4Recipe(has_experts, word == MIXED)
    raise RequestError(f"`--to {word}` is not made", f"write one of fp8, {', '.join(NVFP4_WORDS)}")


def unit_of(encoding: Encoding) -> tuple[int, int]:
    """Rows and columns that a matrix of an encoding must be whole multiples of."""
    if encoding in NVFP4_ENCODINGS:
        return FP4_UNIT
    return BLOCK, BLOCK


class Fp8Recipe:
    """Blocks of 128 x 128, as Qwen publishes them."""

    def encoding(self, name: str) -> Encoding | None:
        """Every matrix that published checkpoints convert."""
        return "fp8_blocks" if is_fp8_matrix(name) else None

    def quantise(self, name: str, matrix: Tensor, largest: float) -> dict[str, Tensor]:
        """Elements, and a factor for each block."""
        elements, scales = quantise_blocks(matrix, _SCALE_DTYPE)
        return {name: elements, scales_name(name, "fp8_blocks"): scales}

    def config(self, kept: Iterable[str], made: Mapping[str, Encoding]) -> dict[str, Any]:
        """In transformers' words."""
        return {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": sorted(kept),
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
        }


class Nvfp4Recipe:
    """ModelOpt's layout, as NVIDIA publishes it, without scales of activations.

    Args:
        has_experts: whether routed experts are what is in NVFP4, else MLPs.
        mixed: whether the other projections of the decoder are FP8.
    """

    def __init__(self, has_experts: bool, mixed: bool) -> None:
        self._has_experts = has_experts
        self._mixed = mixed

    def encoding(self, name: str) -> Encoding | None:
        """As in the published checkpoints."""
        return recipe_encoding(name, self._has_experts, self._mixed)

    def quantise(self, name: str, matrix: Tensor, largest: float) -> dict[str, Tensor]:
        """Elements and scales; of NVFP4 the factor of the matrix too."""
        encoding = self.encoding(name)
        assert encoding is not None
        if encoding == "fp8_tensor":
            scale = torch.tensor(largest / E4M3_MAX or 1.0)
            values = (matrix.float() / scale).clamp(-E4M3_MAX, E4M3_MAX)
            return {name: values.to(torch.float8_e4m3fn), scales_name(name, encoding): scale}
        elements, scales, factor = fp4_words.quantise(matrix, largest)
        return {
            elements_name(name, encoding): elements,
            scales_name(name, encoding): scales,
            factor_name(name, encoding): factor,
        }

    def config(self, kept: Iterable[str], made: Mapping[str, Encoding]) -> dict[str, Any]:
        """In ModelOpt's words; the experts of a layer are one entry."""
        section: dict[str, Any] = {"ignore": sorted(kept), "quant_method": "modelopt"}
        if not self._mixed:
            return section | _LAYER["nvfp4"]
        layers: dict[str, dict[str, Any]] = {}
        for name, encoding in sorted(made.items()):
            module = module_of(name)
            if _EXPERTS in module:
                module = module.partition(_EXPERTS)[0] + _EXPERTS
            layers[module] = _LAYER[encoding]
        return section | {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
