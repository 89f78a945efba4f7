"""Mixture of experts in NVFP4: kernels for few tokens, and the grouped products for many.

`k` of a tile counts elements of the depth: quads of 32 in plain arithmetic, runs of 128 on the
tensor cores.
"""

from __future__ import annotations

from dataclasses import replace

from tokenspeed_plan.codegen.dense.fp4_tiling import QUAD, RUN, UNIT, word_of
from tokenspeed_plan.codegen.tiling import Tiling, Work, up2
from tokenspeed_plan.codegen.tuned import Tile
from tokenspeed_plan.plans.types import WARP_SIZE

_SHARED_DEPTH = 512  # of the shared expert, at once


def up_tiles(work: Work, hidden: int) -> list[Tile]:
    """Each lane of a warp has a quad of a few channels."""
    if work.interpreted:
        return [Tile(1, 32, 256, 8, 1)]
    num_warps = 2
    depth = min(up2(hidden), num_warps * WARP_SIZE * QUAD)
    return [Tile(1, 4, depth, num_warps, 1), Tile(1, 2, min(depth, 1024), 1, 1)]


def down_tiles(work: Work, inner: int) -> list[Tile]:
    """Each thread has one quad of each expert, all of which it loads at once."""
    if work.interpreted:
        return [Tile(1, 64, 128, 8, 1)]
    depth, num_warps = min(up2(inner), 1024), 2
    columns = max(num_warps * WARP_SIZE * QUAD // depth, 1)
    return [
        Tile(1, min(columns, 16), depth, num_warps, 1),
        Tile(1, 2, min(depth, 512), 1, 1),
    ]


def group_tiles(work: Work, pairs: int) -> list[Tile]:
    """Tiles for `pairs` (token, expert) pairs of each expert."""
    if work.interpreted:
        return [Tile(32, 64, RUN, 8, 1)]
    if pairs > 128:
        return [Tile(128, 64, RUN, 8, 3), Tile(64, 64, RUN, 4, 2), Tile(64, 32, RUN, 4, 1)]
    if pairs > 16:
        return [Tile(64, 64, RUN, 4, 3), Tile(64, 32, RUN, 4, 2), Tile(64, 32, RUN, 4, 1)]
    return [Tile(16, 32, RUN, 4, 3), Tile(16, 32, RUN, 4, 1), Tile(16, 16, RUN, 4, 1)]


def up_tiling(base: Tiling, work: Work) -> Tiling:
    """The tiling of an up projection with routed experts in NVFP4."""
    hidden = int(base.constants["H"])
    return _few(base, work, "moe_up_fp4", hidden, hidden)


def down_tiling(base: Tiling, work: Work) -> Tiling:
    """The tiling of a down projection with routed experts in NVFP4."""
    inner, shared = int(base.constants["INNER"]), int(base.constants.get("SHARED", 0))
    return _few(base, work, "moe_down_fp4", inner, shared)


def _few(base: Tiling, work: Work, template: str, depth: int, shared_depth: int) -> Tiling:
    constants = dict(base.constants)
    quads = min(int(constants.pop("BLOCK_K")), up2(depth)) // QUAD
    constants |= {"BLOCK_Q": quads, "UNIT": UNIT}
    ragged = depth // QUAD % quads != 0
    options = dict(base.options) | {"dot": False, "shared_format": ""}
    if options["shared"]:
        constants["BLOCK_S"] = min(up2(shared_depth), _SHARED_DEPTH)
        ragged = ragged or shared_depth % int(constants["BLOCK_S"]) != 0
        options["shared_format"] = word_of(work, "linear_w")
    options |= {"ragged": ragged, "spread": quads < WARP_SIZE * base.num_warps}
    return replace(base, template=template, constants=constants, options=options)


def grouped_tiling(base: Tiling) -> Tiling:
    """The tiling of a grouped product of experts in NVFP4, whose tiles are whole runs deep."""
    constants = dict(base.constants)
    constants["BLOCK_K"] = max(int(constants["BLOCK_K"]), RUN)
    options = dict(base.options) | {"dot": True, "unit": UNIT}
    options["rows"] = "2 * N" if options["silu_mul"] else "N"
    options["ragged"] = int(constants["K"]) % int(constants["BLOCK_K"]) != 0
    return replace(base, template="grouped_linear_fp4", constants=constants, options=options)
