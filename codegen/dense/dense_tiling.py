"""Products: one row in plain arithmetic, bound by the weight's bytes; more rows on the tensor cores."""

from __future__ import annotations

from tokenspeed_plan.codegen.tiling import (
    GEMV_COLUMNS,
    GEMV_ROWS,
    TRITON_DTYPES,
    Tiling,
    Work,
    blocks,
    down2,
    fixed,
    up2,
)
from tokenspeed_plan.codegen.tuned import Tile
from tokenspeed_plan.plans.schema import GridDim
from tokenspeed_plan.plans.types import DTYPE_BITS, Attr, Constant

DOT_ROWS = 16  # of a tile on the tensor cores, at least
MANY_ROWS = 512  # from here a product waits for the tensor cores, not for its weights
ENOUGH = 0.7  # programs a multiprocessor


def linear(work: Work) -> list[Tiling]:
    """The family of `linear.py.j2`."""
    weight_rows, depth = (
        work.width("linear_w" if "linear_w" in work.specs else "w", 0),
        _depth(work),
    )
    columns = weight_rows // 2 if work.has("silu_mul") else weight_rows
    rows = work.num_rows
    if work.interpreted:
        tiles = [_interpreted(work, rows, columns, depth)]
    elif rows <= GEMV_ROWS or (rows <= 2 * DOT_ROWS and weight_rows <= GEMV_COLUMNS):
        tiles = _row_tiles(work, rows, weight_rows, depth)
    else:
        tiles = _matrix_tiles(work, rows, weight_rows, columns)
    return [_tiling(work, tile, rows, columns, depth) for tile in work.tiles(*tiles)]


def _depth(work: Work) -> int:
    return work.width("linear_w" if "linear_w" in work.specs else "w", 1)


def _interpreted(work: Work, rows: int, columns: int, depth: int) -> Tile:
    if rows <= GEMV_ROWS:
        return Tile(
            up2(rows),
            min(up2(columns), 16 if work.has("silu_mul") else 32),
            min(up2(depth), 256),
            8,
            1,
        )
    return Tile(16 if rows <= 16 else 64, 64, 64, 8, 1)


def _row_tiles(work: Work, rows: int, weight_rows: int, depth: int) -> list[Tile]:
    """Each weight is read once: what counts is that all multiprocessors read. Tiles as measured on an H200."""
    m, sms, deep = up2(rows), work.hardware.num_sms, _deep(depth)
    most = max(1, min(8 if m == 1 else 4, down2(weight_rows // (4 * sms))))
    if m > GEMV_ROWS:  # of a router
        first = Tile(min(m, 8), 2, deep, 8, 3)
    elif m > 1:
        first = Tile(m, most, min(deep, 512), 2, 3)
    elif work.has("silu_mul"):
        first = Tile(m, max(most // 2, 1), min(deep, 512), 4, 3)
    elif weight_rows >= 16 * sms and work.has("rms_norm"):
        first = Tile(m, most, min(deep, 256), 2, 1)
    else:
        first = Tile(m, most, min(deep, 1024), 4 if most > 2 else 2, 2)
    return [first, Tile(min(m, 8), 1, min(deep, 512), 4, 1)]


def _deep(depth: int) -> int:
    """A power of two that divides the depth, so that no load is masked; any where there is none of some size."""
    even = min(depth & -depth, 1024)
    return even if even >= 128 else min(up2(depth), 1024)


def _skinny_tiles(work: Work, rows: int, weight_rows: int) -> list[Tile]:
    """Few rows on the tensor cores: each weight once, a few programs on each multiprocessor, long pieces of a row."""
    m, n = max(up2(rows), DOT_ROWS), 32 if weight_rows >= 24 * work.hardware.num_sms else 16
    first = Tile(m, n, 512 // (DTYPE_BITS[work.dtype] // 8), 2 if m == DOT_ROWS else 4, 4)
    return [first, Tile(m, 32, 128, 4, 3), Tile(m, 16, 128, 4, 3), Tile(16, 16, 64, 4, 2)]


def _matrix_tiles(work: Work, rows: int, weight_rows: int, columns: int) -> list[Tile]:
    if rows <= 2 * DOT_ROWS:
        return _skinny_tiles(work, rows, weight_rows)
    narrow = work.dtype == "bf16"
    if rows < MANY_ROWS:
        return _few_tiles(work, rows, columns)
    wide = (
        128 if work.has("silu_mul") or columns * rows < 128 * 256 * work.hardware.num_sms else 256
    )
    deep = 64 if narrow else 32
    large = [Tile(128, n, deep, 8, stages) for n in (wide, wide // 2) for stages in (4, 3)]
    return [*large, Tile(64, 64, 64, 8, 3), Tile(64, 32, 32, 4, 2)]


def _few_tiles(work: Work, rows: int, columns: int) -> list[Tile]:
    """The largest tiles of which there are enough for the machine, as measured on an H200; then smaller ones."""
    wide, deep = 512 // (DTYPE_BITS[work.dtype] // 8), 256 // (DTYPE_BITS[work.dtype] // 8)
    sizes = [
        Tile(64, 16, wide, 8, 3),
        Tile(64, 32, deep, 4, 3),
        Tile(64, 64, deep, 4, 3),
        Tile(128, 64, deep // 2, 8, 3),
        Tile(128, 128, deep // 2, 8, 3),
    ]
    programs = {tile: blocks(rows, tile.m) * blocks(columns, tile.n) for tile in sizes}
    enough = [
        tile
        for tile in sizes
        if tile.m < 2 * rows and programs[tile] >= ENOUGH * work.hardware.num_sms
    ]
    first = enough[-1] if enough else Tile(16, 16, wide, 8, 3)
    return [first, Tile(64, 32, 64, 4, 3), Tile(32, 32, 32, 4, 2)]


def _tiling(work: Work, tile: Tile, rows: int, columns: int, depth: int) -> Tiling:
    constants: dict[str, Constant] = {
        "N": columns,
        "K": depth,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "STAGES": tile.num_stages,
    }
    dot = tile.m >= DOT_ROWS
    if dot:
        constants |= {"PRECISION": work.precision} | _groups(work, rows)
    if work.has("rms_norm"):
        constants |= {"EPS": work.number("rms_norm", "eps")}
    if work.has("expert_sum"):
        constants |= {"TOP_K": work.width("expert_sum_weights")}
    # Of sequences as many as the program has at most: those past the last write nothing.
    grid = (
        fixed(blocks(columns, tile.n)),
        fixed(blocks(rows, tile.m)) if work.by_seqs else GridDim(block=tile.m),
    )
    options = _options(work, dot, tile.k, depth)
    return Tiling(
        "linear", constants, grid, tile.num_warps, tile.num_stages, options, prefetches=not dot
    )


def _groups(work: Work, rows: int) -> dict[str, Constant]:
    """Of many tiles of rows, how many go side by side; measured on an H200: 4 and 8 are 5 and 2 % slower."""
    if work.interpreted:
        return {"GROUP_M": 2} if rows > DOT_ROWS else {}
    return {"GROUP_M": 16} if rows >= MANY_ROWS else {}


def _options(work: Work, dot: bool, deep: int, depth: int) -> dict[str, object]:
    product = work.part("linear")
    norm, gather = work.has("rms_norm"), work.has("last_token")
    x = (
        "rms_norm_x"
        if norm
        else "last_token_x"
        if gather
        else "linear_x"
        if "linear_x" in work.specs
        else "x"
    )
    return {
        "x": x,
        "dot": dot,
        "norm": norm,
        "gather": gather,
        "silu_mul": work.has("silu_mul"),
        "expert_sum": work.has("expert_sum"),
        "add": work.has("add"),
        "ragged": depth % deep != 0,
        "dtype": TRITON_DTYPES[work.dtype],
        "weight_name": "linear_w" if "linear_w" in work.specs else "w",
        "outputs": _outputs(work, product.attrs["splits"]),
    }


def _outputs(work: Work, sizes: Attr) -> list[tuple[str, int, int]]:
    """(name, first column, columns) of what the last part writes."""
    names = [name for name in work.outputs if name != "rms_norm_y"]
    if len(names) == 1:
        return [(names[0], 0, 0)]
    assert isinstance(sizes, tuple)
    return [(name, sum(sizes[:i]), sizes[i]) for i, name in enumerate(names)]


def grouped(work: Work) -> list[Tiling]:
    """Products of sorted experts."""
    up = work.kind == "grouped_up"
    experts, rows_w, depth = (work.width("w", dim) for dim in range(3))
    columns = rows_w // 2 if up else rows_w
    top_k = work.width("order")
    pairs = work.num_rows * top_k // max(experts, 1)
    tiles = _group_tiles(work, pairs, columns, depth)
    made = []
    for tile in work.tiles(*tiles):
        constants: dict[str, Constant] = {
            "N": columns,
            "K": depth,
            "EXPERTS": experts,
            "TOP_K": top_k,
            "BLOCK_E": up2(experts + 1),
            "BLOCK_M": tile.m,
            "BLOCK_N": tile.n,
            "BLOCK_K": tile.k,
            "PRECISION": work.precision,
        }
        tiles_m = GridDim(
            fixed=experts, scale=top_k, block=tile.m
        )  # as many at most end in half-empty tiles
        if work.by_seqs:
            tiles_m = fixed(experts + blocks(work.num_rows * top_k, tile.m))
        grid = (fixed(blocks(columns, tile.n)), tiles_m)
        options = {
            "silu_mul": up,
            "x": "x" if up else "h",
            "ragged": depth % tile.k != 0,
            "uneven": columns % tile.n != 0,
            # of 32 rows the newest instructions take none
            "halves": tile.m >= 128 or work.interpreted,
        }
        made.append(
            Tiling("grouped_linear", constants, grid, tile.num_warps, tile.num_stages, options)
        )
    return made


def _group_tiles(work: Work, rows: int, columns: int, depth: int) -> list[Tile]:
    if work.interpreted:
        return [Tile(32, 64, 64, 8, 1)]
    if rows > 128:
        return [
            Tile(128, 128, 64, 8, 4),
            Tile(128, 64, 64, 8, 3),
            Tile(64, 64, 64, 4, 3),
            Tile(64, 32, 32, 4, 3),
        ]
    m = 64 if rows > 16 else 16
    first = [Tile(64, 128, 64, 4, 4)] if m == 64 and work.dtype == "bf16" and columns >= 128 else []
    return [*first, Tile(m, 64, 64, 4, 3), Tile(m, 32, 64, 4, 3), Tile(16, 32, 32, 4, 2)]
