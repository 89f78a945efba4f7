"""Products with weights in NVFP4.

With few rows of x plain arithmetic, in which a thread has quads of four words; with more rows tiles
are made plain for the tensor cores, one or more runs of 128 elements deep.
"""

from __future__ import annotations

from collections.abc import Mapping

from tokenspeed_plan.codegen.tiling import GEMV_ROWS, Tiling, Work, blocks, fixed, per_rows, up2
from tokenspeed_plan.codegen.tuned import Tile
from tokenspeed_plan.plans.schema import GridDim
from tokenspeed_plan.plans.types import FP4_UNIT, WARP_SIZE, Constant

DOT_ROWS = 16  # of a tile on the tensor cores, at least

RUN = FP4_UNIT[1]
QUAD = 32  # elements of four words, which a thread loads at once
UNIT = float(1 << 22)  # what elements and scales lack (`_fp4.py.j2`)


def word_of(work: Work, weight: str) -> str:
    """How the elements of a weight are stored: plain, fp8 or fp4."""
    if work.is_fp4(weight):
        return "fp4"
    if work.is_fp8(weight):
        return "fp8"
    return "plain"


def tiles_of(work: Work, weight: str) -> list[Tile]:
    """Tiles of a product, best first."""
    rows, columns, depth = work.num_rows, work.width(weight, 0), work.width(weight, 1)
    if work.has("silu_mul"):
        columns //= 2
    if work.interpreted:
        m = 1 if rows <= GEMV_ROWS else max(DOT_ROWS, min(up2(rows), 64))
        return [Tile(m, 32, 2 * RUN, 8, 1)]
    if rows <= GEMV_ROWS:
        wide = min(up2(depth), 2 * WARP_SIZE * QUAD)
        return [Tile(1, 4, wide, 2, 1), Tile(1, 2, min(wide, 1024), 1, 1)]
    if rows <= 2 * DOT_ROWS:
        m = max(up2(rows), DOT_ROWS)
        return [Tile(m, 16, RUN, 4, 4), Tile(m, 16, RUN, 4, 2), Tile(DOT_ROWS, 16, RUN, 4, 1)]
    if rows <= 64:
        return [Tile(64, 32, RUN, 4, 3), Tile(64, 16, RUN, 4, 1), Tile(32, 16, RUN, 4, 1)]
    return [Tile(128, 64, RUN, 8, 3), Tile(64, 64, RUN, 4, 2), Tile(64, 32, RUN, 4, 1)]


def linear(work: Work, weight: str, options: Mapping[str, object]) -> list[Tiling]:
    """The products of `linear_fp4.py.j2`.

    Args:
        work: whose weight is in NVFP4.
        weight: its name.
        options: those of a product with plain weights.
    """
    tiles = work.tiles(*tiles_of(work, weight))
    return [_tiling(work, weight, tile, options) for tile in dict.fromkeys(tiles)]


def _tiling(work: Work, weight: str, tile: Tile, options: Mapping[str, object]) -> Tiling:
    columns, depth = work.width(weight, 0), work.width(weight, 1)
    if work.has("silu_mul"):
        columns //= 2
    dot = tile.m >= DOT_ROWS
    constants: dict[str, Constant] = {"N": columns, "K": depth, "UNIT": UNIT}
    constants |= {"BLOCK_N": tile.n, "STAGES": tile.num_stages}
    if work.has("expert_sum"):
        constants["TOP_K"] = work.width("expert_sum_weights")
    column_tiles = fixed(blocks(columns, tile.n))
    if dot:
        constants |= {"BLOCK_M": tile.m, "BLOCK_K": max(tile.k, RUN), "PRECISION": work.precision}
        row_tiles = GridDim(block=tile.m)
        if work.by_seqs:
            row_tiles = fixed(blocks(work.num_rows, tile.m))
        grid = (column_tiles, row_tiles)
    else:
        constants["BLOCK_Q"] = tile.k // QUAD
        grid = (per_rows(1, work.by_seqs), column_tiles)
    return Tiling(
        template="linear_fp4",
        constants=constants,
        grid=grid,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        options=dict(options)
        | {"dot": dot, "ragged": depth % max(tile.k, RUN) != 0}
        | {"spread": tile.k // QUAD < WARP_SIZE * tile.num_warps},
        prefetches=not dot,
    )
