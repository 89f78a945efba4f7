"""Which matrices NVFP4 checkpoints quantise, as NVIDIA publishes them.

Of the first kind (`nvfp4`) the routed experts of the decoder, of a dense model its MLPs, are in
NVFP4 and all else is BF16. Of the second (`nvfp4-mixed`, quant_algo MIXED_PRECISION) the other
projections of the decoder are FP8 with one scale a matrix. The MTP layer stays BF16 in both.
"""

from __future__ import annotations

from tokenspeed_plan.plans.encodings import Encoding
from tokenspeed_plan.plans.fp8_format import is_fp8_matrix

MIXED = "nvfp4-mixed"
NVFP4_WORDS = ("nvfp4", MIXED)
_MTP = "mtp."


def recipe_encoding(name: str, has_experts: bool, mixed: bool) -> Encoding | None:
    """The encoding of a checkpoint tensor; None where it stays as it is.

    Args:
        name: of the tensor.
        has_experts: whether the model has routed experts.
        mixed: whether other projections are FP8.
    """
    if not is_fp8_matrix(name) or name.startswith(_MTP):
        return None
    routed = ".mlp.experts." in name
    if routed or (not has_experts and ".mlp." in name):
        return "nvfp4"
    if mixed:
        return "fp8_tensor"
    return None
