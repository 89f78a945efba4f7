"""FP8 checkpoints: what is stored in blocks, and under which names.

They are laid out as Qwen publishes them: beside a matrix `X.weight` of e4m3 elements there is
`X.weight_scale_inv`, a factor for each block of 128 x 128. An element stands for itself times the
factor of its block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenspeed_plan.plans.types import FORMATS, Format

FP8 = FORMATS["fp8"]
BLOCK = FP8.block[0]  # rows and columns
FP8_ROWS = Format(dtype="fp8", block=(1, BLOCK), scale="fp32")  # of activations
STORED_FP8 = "F8_E4M3"  # as safetensors spells it
STORED_SCALES = ("BF16", "F16", "F32")
E4M3_MAX = 448.0
MIN_AMAX = 1e-30  # of activations that are quantised: no factor is 0, and its inverse is finite
# Last words of the names of matrices that published FP8 checkpoints quantise, in the decoder and in
# the MTP layer. Tables, heads, norms, convolutions, routers and gates stay as they are.
_MATRICES = frozenset(
    (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "in_proj_qkv",
        "in_proj_qkvz",
        "in_proj_z",
        "out_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "gate_up_proj",
    )
)
_DECODERS = ("layers.", "model.layers.", "model.language_model.layers.", "mtp.layers.")


def scale_name(name: str) -> str:
    """The checkpoint tensor with the factors of `name`'s blocks."""
    return f"{name}_scale_inv"


def module_of(name: str) -> str:
    """The module whose weight a checkpoint tensor is."""
    return name.removesuffix(".weight")


def is_fp8_matrix(name: str) -> bool:
    """Whether published FP8 checkpoints quantise the tensor of this name."""
    return name.startswith(_DECODERS) and module_of(name).rpartition(".")[2] in _MATRICES


def is_unconverted(name: str, modules: Iterable[str]) -> bool:
    """Whether `modules_to_not_convert` names the module of a tensor, or one that it lies in."""
    path = module_of(name).split(".")
    return any(_holds(module.split("."), path) for module in modules)


def _holds(words: Sequence[str], path: Sequence[str]) -> bool:
    """Whether a module's words stand together in the path of another."""
    count = len(words)
    return any(path[at : at + count] == words for at in range(len(path) - count + 1))


def blocks(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the factors of a tensor: its last two dimensions in blocks."""
    *stack, rows, columns = shape
    return (*stack, -(-rows // BLOCK), -(-columns // BLOCK))
