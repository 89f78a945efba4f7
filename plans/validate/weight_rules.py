"""Weights: the pieces of the checkpoint tile each of them exactly."""

from __future__ import annotations

import math
from itertools import combinations

from tokenspeed_plan.plans.schema import Piece, Plan, Pool, WeightSpec
from tokenspeed_plan.plans.validate.refusal import refuse


def check_weights(plan: Plan, pool: Pool) -> None:
    """Every element of a weight comes from one element of the checkpoint.

    Raises:
        PlanError: pieces stick out, overlap, or leave a hole.
    """
    for weight in pool.weights:
        shape = weight.tensor.bind(0, 0)
        for piece in weight.pieces:
            if not _fits(piece, shape):
                raise refuse(
                    f"a piece of `{weight.name}` from `{piece.source}` does not fit {list(shape)}"
                )
        _check_tiling(weight, shape)


def _check_tiling(weight: WeightSpec, shape: tuple[int, ...]) -> None:
    """Boxes inside a larger box that do not meet and have its volume together fill it."""
    covered = sum(math.prod(piece.size) for piece in weight.pieces)
    if covered != math.prod(shape):
        raise refuse(f"the pieces of `{weight.name}` do not tile it")
    for one, other in combinations(weight.pieces, 2):
        if _boxes_meet(one, other):
            raise refuse(f"pieces of `{weight.name}` overlap")


def _fits(piece: Piece, shape: tuple[int, ...]) -> bool:
    rank = len(shape)
    if not len(piece.start) == len(piece.size) == len(piece.at) == rank:
        return False
    for start, size, at, dim in zip(piece.start, piece.size, piece.at, shape, strict=True):
        if start < 0 or at < 0 or size <= 0 or at + size > dim:
            return False
    return all(0 <= shift.dim < rank for shift in piece.shifts)


def _boxes_meet(one: Piece, two: Piece) -> bool:
    spans = zip(one.at, one.size, two.at, two.size, strict=True)
    return all(a < b + n and b < a + m for a, m, b, n in spans)
