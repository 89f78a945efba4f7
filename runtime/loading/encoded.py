"""What a weight is filled with: tensors of the checkpoint, by how it encodes each piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from tokenspeed_plan.plans.encodings import (
    GROUP,
    NVFP4,
    STORED_FP4,
    Encoding,
    elements_name,
    factor_name,
    scales_name,
)
from tokenspeed_plan.plans.fp8_format import BLOCK, STORED_FP8, STORED_SCALES
from tokenspeed_plan.plans.schema import Piece, Shift, WeightSpec
from tokenspeed_plan.runtime.execution import fp4_words, fp8_blocks

FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True, slots=True)
class Filling:
    """A tensor that a piece fills, and with what.

    Attributes:
        tensor: elements, scales or factors of a weight.
        piece: in the elements of that tensor.
        dtypes: of the checkpoint's tensors.
        is_number: whether the checkpoint has one number for all of the piece.
        divides: whether the weight is divided by that number.
        is_scale: whether it is the e4m3 scales of NVFP4, none of which is negative or NaN.
    """

    tensor: Tensor
    piece: Piece
    dtypes: Sequence[str] = FLOATS
    is_number: bool = False
    divides: bool = False
    is_scale: bool = False


def fillings(weight: WeightSpec, piece: Piece, stored: Tensor) -> list[Filling]:
    """What a piece of a weight is made of.

    Args:
        weight: in the plan.
        piece: of it.
        stored: its tensor; of a block-scaled one the flat run.
    """
    spec, encoding = weight.tensor, piece.encoding
    if not spec.format.block:
        return [Filling(stored, piece)]
    if spec.format == NVFP4:
        assert encoding is not None, "the validator refuses it"
        return _nvfp4(fp4_words.parts_of(stored, spec), piece, encoding)
    elements, scales = fp8_blocks.parts_of(stored, spec)
    encoding = encoding or "fp8_blocks"
    blocks = _named(_cut(piece, BLOCK, BLOCK), partial(scales_name, encoding=encoding))
    return [
        Filling(elements, piece, (STORED_FP8,)),
        Filling(scales, blocks, STORED_SCALES, is_number=encoding == "fp8_tensor"),
    ]


def _nvfp4(parts: fp4_words.Fp4, piece: Piece, encoding: Encoding) -> list[Filling]:
    """The elements are bytes in the order of the checkpoint; `finish` makes words of them."""
    elements, scales, factor = (
        partial(name, encoding=encoding) for name in (elements_name, scales_name, factor_name)
    )
    rows = _named(_without_columns(piece), factor)
    divides = encoding == "nvfp4_packed"
    return [
        Filling(parts.elements, _named(_cut(piece, 1, 2), elements), (STORED_FP4,)),
        Filling(parts.scales, _named(_cut(piece, 1, GROUP), scales), (STORED_FP8,), is_scale=True),
        Filling(parts.factors, rows, STORED_SCALES, is_number=True, divides=divides),
    ]


def finish(weight: WeightSpec, stored: Tensor) -> None:
    """Bring the elements of NVFP4 into the order of memory, one matrix after the other."""
    if weight.tensor.format != NVFP4:
        return
    elements = fp4_words.parts_of(stored, weight.tensor).elements
    for matrix in elements.view(-1, *elements.shape[-2:]):
        matrix.copy_(fp4_words.to_words(matrix))


def _named(piece: Piece, name: Callable[[str], str]) -> Piece:
    return piece.model_copy(update={"source": name(piece.source)})


def _cut(piece: Piece, rows: int, columns: int) -> Piece:
    """The piece in a tensor with one element for so many rows and columns."""
    first = len(piece.size) - 2
    units = (*(1 for _ in range(first)), rows, columns)

    def cut(numbers: Sequence[int]) -> tuple[int, ...]:
        return tuple(number // unit for number, unit in zip(numbers, units, strict=True))

    shifts = tuple(_shorter(shift, units[shift.dim]) for shift in piece.shifts)
    return piece.model_copy(
        update={
            "start": cut(piece.start),
            "size": cut(piece.size),
            "at": cut(piece.at),
            "shifts": shifts,
        }
    )


def _shorter(shift: Shift, unit: int) -> Shift:
    by = shift.by.model_copy(update={"step": shift.by.step // unit})
    return shift.model_copy(update={"by": by})


def _without_columns(piece: Piece) -> Piece:
    """The rows of a piece."""
    last = len(piece.size) - 1
    return piece.model_copy(
        update={
            "start": piece.start[:-1],
            "size": piece.size[:-1],
            "at": piece.at[:-1],
            "shifts": tuple(shift for shift in piece.shifts if shift.dim != last),
        }
    )
