"""How a checkpoint encodes a quantised matrix: the tensors that hold it, and its format in a plan.

| encoding | elements of `X.weight` | their scales |
| --- | --- | --- |
| `fp8_blocks` | `X.weight`, e4m3 | `X.weight_scale_inv`, one for each 128 x 128 |
| `fp8_tensor` | `X.weight`, e4m3 | `X.weight_scale`, one |
| `nvfp4` | `X.weight`, two e2m1 a byte | `X.weight_scale`, e4m3, one for 16 elements of a row; \
times `X.weight_scale_2`, one fp32 |
| `nvfp4_packed` | `X.weight_packed`, the same | the same; divided by `X.weight_global_scale` |

The first is Qwen's, the next two are ModelOpt's, the last is that of compressed-tensors. Static
scales of activations (`X.input_scale`, `X.input_global_scale`) are not read: activations stay as
they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from tokenspeed_plan.plans.fp8_format import STORED_FP8, module_of, scale_name
from tokenspeed_plan.plans.types import FORMATS, Format

Encoding = Literal["fp8_blocks", "fp8_tensor", "nvfp4", "nvfp4_packed"]
ENCODED_FORMATS: dict[Encoding, Format] = {
    "fp8_blocks": FORMATS["fp8"],
    "fp8_tensor": FORMATS["fp8"],
    "nvfp4": FORMATS["nvfp4"],
    "nvfp4_packed": FORMATS["nvfp4"],
}
NVFP4_ENCODINGS: tuple[Encoding, ...] = ("nvfp4", "nvfp4_packed")
NVFP4 = FORMATS["nvfp4"]
GROUP = NVFP4.block[1]  # elements of a row that share a scale
STORED_FP4 = "U8"  # two elements a byte, the first of them in the low half
E2M1_MAX = 6.0
# What else may lie beside a quantised matrix, and is not read.
UNREAD = ("input_scale", "input_global_scale")


def elements_name(name: str, encoding: Encoding) -> str:
    """The tensor with the elements of the matrix `name`."""
    if encoding == "nvfp4_packed":
        return f"{module_of(name)}.weight_packed"
    return name


def scales_name(name: str, encoding: Encoding) -> str:
    """The tensor with the scales of its blocks, or with its only one."""
    if encoding == "fp8_blocks":
        return scale_name(name)
    return f"{module_of(name)}.weight_scale"


def factor_name(name: str, encoding: Encoding) -> str:
    """The tensor with the factor of an NVFP4 matrix."""
    if encoding == "nvfp4_packed":
        return f"{module_of(name)}.weight_global_scale"
    return f"{module_of(name)}.weight_scale_2"


def find_encoding(name: str, dtype_of: Callable[[str], str | None]) -> Encoding | None:
    """The encoding of a matrix by what is stored; None where its elements are plain, or missing.

    Args:
        name: of the matrix, such as `X.weight`.
        dtype_of: the dtype of a tensor as safetensors spells it, None where there is none.
    """
    dtype = dtype_of(name)
    if dtype == STORED_FP8:
        has_blocks = dtype_of(scales_name(name, "fp8_blocks")) is not None
        is_single = dtype_of(scales_name(name, "fp8_tensor")) is not None
        if is_single and not has_blocks:
            return "fp8_tensor"
        return "fp8_blocks"
    if dtype == STORED_FP4:
        return "nvfp4"
    if dtype is None and dtype_of(elements_name(name, "nvfp4_packed")) is not None:
        return "nvfp4_packed"
    return None
