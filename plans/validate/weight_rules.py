"""Weights: the pieces of the checkpoint tile each of them exactly."""

from __future__ import annotations

import math
from itertools import combinations

from tokenspeed_plan.plans.encodings import ENCODED_FORMATS
from tokenspeed_plan.plans.fp8_format import FP8
from tokenspeed_plan.plans.schema import Piece, Plan, Pool, WeightSpec
from tokenspeed_plan.plans.validate.refusal import refuse


def check_weights(plan: Plan, pool: Pool) -> None:
    """Every element of a weight comes from one element of the checkpoint.

    Raises:
        PlanError: pieces stick out, overlap, or leave a hole, or are encoded in another format; or
            something is rounded that cannot.
    """
    for weight in pool.weights:
        shape = weight.tensor.bind(0, 0)
        for piece in weight.pieces:
            if not _fits(piece, shape):
                raise refuse(
                    f"a piece of `{weight.name}` from `{piece.source}` does not fit {list(shape)}"
                )
            _check_encoding(weight, piece)
            if weight.tensor.format.block:
                _check_blocks(weight, piece)
        if weight.rounds:
            _check_rounded(weight)
        _check_tiling(weight, shape)


def _check_encoding(weight: WeightSpec, piece: Piece) -> None:
    """A piece is encoded in the format of its weight; blocks of FP8 need no word for it."""
    wanted, encoding = weight.tensor.format, piece.encoding
    fits = not wanted.block or wanted == ENCODED_FORMATS["fp8_blocks"]
    if encoding is not None:
        fits = encoding != "fp8_blocks" and wanted == ENCODED_FORMATS[encoding]
    if not fits:
        raise refuse(
            f"a piece of `{weight.name}` from `{piece.source}` is encoded as {encoding}, "
            f"which makes no {wanted}"
        )


def _check_rounded(weight: WeightSpec) -> None:
    """Only a whole matrix is rounded to FP8 when it is loaded."""
    stacked = [piece.source for piece in weight.pieces if "{expert}" in piece.source]
    if weight.tensor.format != FP8 or len(weight.tensor.shape) != 2 or stacked:
        raise refuse(f"`{weight.name}` is rounded, and is no matrix in {FP8}")


def _check_blocks(weight: WeightSpec, piece: Piece) -> None:
    """A piece of a block-scaled weight is whole blocks, and stays so on every rank."""
    blocks = weight.tensor.format.unit
    first = len(piece.size) - len(blocks)
    steps = [0] * len(piece.size)
    for shift in piece.shifts:
        steps[shift.dim] = shift.by.step
    for dim, block in enumerate(blocks, first):
        numbers = (piece.start[dim], piece.size[dim], piece.at[dim], steps[dim])
        if first < 0 or any(number % block for number in numbers):
            raise refuse(
                f"a piece of `{weight.name}` from `{piece.source}` cuts a block of "
                f"{weight.tensor.format}"
            )


def _check_tiling(weight: WeightSpec, shape: tuple[int, ...]) -> None:
    """Boxes that lie inside a larger box, do not meet, and add up to its volume fill it."""
    needed = math.prod(shape)
    volumes = [math.prod(piece.size) for piece in weight.pieces]
    covered = sum(volumes)
    if covered != needed:
        raise refuse(f"the pieces of `{weight.name}` cover {covered} of {needed} elements")
    for one, other in combinations(weight.pieces, 2):
        if _boxes_meet(one, other):
            raise refuse(f"pieces of `{weight.name}` overlap")


def _fits(piece: Piece, shape: tuple[int, ...]) -> bool:
    """Whether a piece lies inside a weight of this shape."""
    num_dims = len(shape)
    boxes = (piece.start, piece.size, piece.at)
    for box in boxes:
        if len(box) != num_dims:
            return False
    for start, size, at, dim in zip(*boxes, shape, strict=True):
        if start < 0 or size <= 0:
            return False
        if at < 0 or at + size > dim:
            return False
    dims = range(num_dims)
    return all(shift.dim in dims for shift in piece.shifts)


def _boxes_meet(one: Piece, two: Piece) -> bool:
    """Whether two pieces have an element in common: they overlap in every dimension."""
    spans = zip(one.at, one.size, two.at, two.size, strict=True)
    for at, size, other_at, other_size in spans:
        end = at + size
        other_end = other_at + other_size
        if at >= other_end or other_at >= end:
            return False
    return True
