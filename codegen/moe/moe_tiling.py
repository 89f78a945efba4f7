"""Mixture of experts: kernels for few tokens, and the sort and the grouped products for many."""

from __future__ import annotations

from dataclasses import replace

from tokenspeed_plan.codegen.moe import moe_fp4_tiling, specialised_tiling
from tokenspeed_plan.codegen.tiling import (
    FOLD_ROWS,
    RUN,
    TRITON_DTYPES,
    WARP_RUNS,
    Tiling,
    Work,
    blocks,
    fixed,
    in_whole_blocks,
    per_rows,
    run_warps,
    up2,
)
from tokenspeed_plan.codegen.tuned import Tile
from tokenspeed_plan.plans.fp8_format import BLOCK
from tokenspeed_plan.plans.schema import GridDim
from tokenspeed_plan.plans.types import Constant

DOT_ROWS, DOT_COLUMNS, DOT_DEPTH = 16, 8, 64  # of a tile on the tensor cores with one token
MANY_PAIRS, STAYING_DEPTH = 128, 512  # of an expert's rows that stay in shared memory
FEW_TOKENS = 2  # up to which plain arithmetic has more of the experts' weights on their way


def _choice(work: Work, logits: str) -> dict[str, Constant]:
    """Constants of a top-k over `logits`."""
    experts = work.width(logits)
    return {"EXPERTS": experts, "TOP_K": work.size("topk", "top_k"), "BLOCK_E": up2(experts)}


def _block(work: Work, weight: str) -> dict[str, Constant]:
    """The side of a block of an FP8 weight."""
    return {"BLOCK": BLOCK, "RUN": RUN} if work.is_fp8(weight) else {}


def topk(work: Work) -> list[Tiling]:
    """A program a token."""
    constants = _choice(work, "logits")
    constants["BLOCK_J"] = up2(int(constants["TOP_K"]))
    tiling = Tiling(
        template="topk",
        constants=constants,
        grid=(per_rows(1, work.by_seqs),),
        num_warps=1,
        num_stages=1,
    )
    return [tiling]


def moe_up(work: Work) -> list[Tiling]:
    """A program a token, expert (a shared one is one more) and block of channels."""
    writes_topk = "topk_ids" in work.outputs
    constants = _choice(work, "topk_logits") | {
        "LOCAL": work.width("experts_up_w", 0),
        "INNER": work.width("experts_up_w", 1) // 2,
        "H": work.width("experts_up_w"),
    }
    if work.has("linear"):
        constants["SHARED"] = work.width("linear_w", 0) // 2
    if writes_topk:
        constants["BLOCK_J"] = up2(int(constants["TOP_K"]))
    constants |= _block(work, "experts_up_w")
    shapes = _up_tiles(work, int(constants["H"]))
    # A down projection that recomputes the top-k prefetches the logits, from before this kernel.
    late = not writes_topk
    tilings = [_up_tiling(work, tile, constants, late) for tile in work.tiles(*shapes)]
    if work.is_fp4("experts_up_w"):
        return [moe_fp4_tiling.up_tiling(tiling, work) for tiling in tilings]
    return tilings


def _up_tiles(work: Work, hidden: int) -> list[Tile]:
    if work.is_fp4("experts_up_w"):
        return moe_fp4_tiling.up_tiles(work, hidden)
    if work.interpreted:
        return [Tile(1, 32, 128, 8, 1)]
    depth = max(min(hidden & -hidden, 2048), 256)  # divides the hidden size: no load is masked
    num_warps = 4 if work.num_tokens == 1 else 2
    first = Tile(1, min(8192 // depth, 8), depth, num_warps, 2)
    if work.is_fp8("experts_up_w"):
        block = min(hidden & -hidden, WARP_RUNS)
        columns = 2 if work.num_tokens <= 8 else 4
        plain = [Tile(1, columns, block, 1, 1), Tile(1, 1, block, 1, 1)]
        if work.num_tokens > FEW_TOKENS and work.dtype == "bf16":
            return [Tile(1, DOT_ROWS, block, 1, 1), *plain]
        return plain
    return [first, Tile(1, 4, 256, 4, 2), Tile(1, 2, 256, 4, 1)]


def _up_tiling(work: Work, tile: Tile, constants: dict[str, Constant], late: bool) -> Tiling:
    shared = int(constants.get("SHARED", 0))
    channels = max(int(constants["INNER"]), shared)
    block = min(tile.n, up2(channels))
    sizes: dict[str, Constant] = {
        "BLOCK_N": block,
        "BLOCK_K": min(tile.k, up2(int(constants["H"]))),
    }
    dot = "RUN" in constants and block >= DOT_ROWS and work.dtype == "bf16"
    dot = dot and not work.interpreted
    if "RUN" not in constants:
        sizes["STAGES"] = tile.num_stages
    if dot:
        constants = {name: value for name, value in constants.items() if name != "RUN"}
        sizes |= {"BLOCK_K": BLOCK, "COLUMNS": DOT_COLUMNS}
    if late and not work.is_fp4("experts_up_w"):
        sizes["WARPS"] = tile.num_warps
    num_experts = int(constants["TOP_K"]) + int(shared > 0)
    return Tiling(
        template="moe_up",
        constants=constants | sizes,
        grid=(per_rows(1, work.by_seqs), fixed(num_experts), fixed(blocks(channels, block))),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        options={
            "narrow": work.specs["topk_logits"].dtype == "bf16",
            "shared": shared > 0,
            "fp8": "BLOCK" in constants,
            "dot": dot,
            "num_parts": BLOCK // DOT_DEPTH,
        },
        trigger_after_wait=late,
    )


def moe_down(work: Work) -> list[Tiling]:
    """A program for some columns of one token, over all its experts."""
    constants: dict[str, Constant] = {
        "LOCAL": work.width("experts_down_w", 0),
        "H": work.width("experts_down_w", 1),
        "INNER": work.width("experts_down_w", 2),
    }
    constants |= _block(work, "experts_down_w")
    if work.has("linear"):
        constants["SHARED"] = work.width("linear_w")
    options: dict[str, object] = {
        "add": work.has("add"),
        "recompute": work.has("topk"),
        "shared": work.has("linear"),
    }
    if work.has("topk"):
        constants |= _choice(work, "topk_logits")
        options["narrow"] = work.specs["topk_logits"].dtype == "bf16"
    else:
        constants["TOP_K"] = work.width("experts_down_weights")
    shapes = _down_tiles(work)
    if work.is_fp8("experts_down_w"):
        constants["BLOCK_J"] = up2(int(constants["TOP_K"]))
    tilings = [_down_tiling(work, tile, constants, options) for tile in work.tiles(*shapes)]
    if work.is_fp4("experts_down_w"):
        return [moe_fp4_tiling.down_tiling(tiling, work) for tiling in tilings]
    return tilings


def _per_token(work: Work) -> int:
    """Experts of a token."""
    if work.has("topk"):
        return work.size("topk", "top_k")
    return work.width("experts_down_weights")


def _down_tiles(work: Work) -> list[Tile]:
    if work.is_fp4("experts_down_w"):
        return moe_fp4_tiling.down_tiles(work, work.width("experts_down_w"))
    if work.interpreted:
        return [Tile(1, 64, 128, 8, 1)]
    if work.is_fp8("experts_down_w"):
        inner, _ = run_warps(min(work.width("experts_down_w"), WARP_RUNS))
        runs = up2(_per_token(work)) * inner
        if work.num_tokens > 1:  # a thread has runs of four experts
            runs //= 4
        warps = max(runs // WARP_RUNS, 1)
        return [Tile(1, 4, inner, warps, 1), Tile(1, 2, inner, warps, 1)]
    first = Tile(1, 1, 256, 2, 1)
    if work.num_tokens == 1:
        first = Tile(1, 2, 512, 2, 1)
    return [first, Tile(1, 4, 256, 4, 1)]


def _down_tiling(
    work: Work, tile: Tile, constants: dict[str, Constant], options: dict[str, object]
) -> Tiling:
    hidden = int(constants["H"])
    depth = max(int(constants["INNER"]), int(constants.get("SHARED", 0)))
    block = min(tile.n, up2(hidden))
    prefetch: tuple[str, ...] = ()
    if work.has(
        "topk"
    ):  # the logits are older than the up projection, which triggers after its wait
        prefetch = ("topk_logits",)
    return Tiling(
        template="moe_down_fp8" if "RUN" in constants else "moe_down",
        constants=constants | {"BLOCK_N": block, "BLOCK_K": min(tile.k, up2(depth))},
        grid=(per_rows(1, work.by_seqs), fixed(blocks(hidden, block))),
        num_warps=tile.num_warps,
        num_stages=1,
        options=options,
        prefetches=True,
        prefetch=prefetch,
    )


def expert_sort(work: Work) -> list[Tiling]:
    """A program an expert."""
    experts, top_k = work.size("expert_sort", "num_experts"), work.width("ids")
    block = 1024
    if not work.interpreted:  # as measured on an H200
        block = min(up2(work.num_rows * top_k), 8192)
    tiling = Tiling(
        template="expert_sort",
        constants={"EXPERTS": experts, "TOP_K": top_k, "BLOCK": block},
        grid=(fixed(experts + 1),),
        num_warps=8 if block > 1024 else 4,
        num_stages=1,
    )
    return [tiling]


def expert_count(work: Work) -> list[Tiling]:
    """A program a part of the tokens."""
    tiling = Tiling(
        template="expert_count",
        constants=_parts(work, "expert_count"),
        grid=(fixed(work.size("expert_count", "num_parts")),),
        num_warps=4,
        num_stages=1,
    )
    return [tiling]


def expert_place(work: Work) -> list[Tiling]:
    """A program a part of the tokens."""
    constants = _parts(work, "expert_place")
    rows = min(16, up2(int(constants["PARTS"])))
    tiling = Tiling(
        template="expert_place",
        constants=constants | {"ROWS": rows},
        grid=(fixed(int(constants["PARTS"])),),
        num_warps=8,
        num_stages=1,
    )
    return [tiling]


def _parts(work: Work, kind: str) -> dict[str, Constant]:
    """How the tokens are cut into parts; one bin more than needed is for what is no pair."""
    experts, parts = work.size(kind, "num_experts"), work.size(kind, "num_parts")
    top_k = work.width("ids")
    return {
        "EXPERTS": experts,
        "TOP_K": top_k,
        "PARTS": parts,
        "BLOCK": up2(blocks(work.num_rows, parts) * top_k),
        "BINS": up2(experts + 2),
    }


def expert_sum(work: Work) -> list[Tiling]:
    """A program for a block of columns of one token."""
    prefix = "expert_sum_" if work.has("add") else ""
    top_k = work.width(f"{prefix}weights")
    hidden = work.width(f"{prefix}d") // top_k
    block = min(up2(hidden), 1024)
    tiling = Tiling(
        template="expert_sum",
        constants={"H": hidden, "TOP_K": top_k, "BLOCK_H": block},
        grid=(per_rows(1, work.by_seqs), fixed(blocks(hidden, block))),
        num_warps=4,
        num_stages=1,
        options={"add": work.has("add"), "prefix": prefix},
    )
    return [tiling]


def grouped(work: Work) -> list[Tiling]:
    """Products of sorted (token, expert) pairs: up with its SwiGLU, or down."""
    experts, columns = work.width("w", 0), work.width("w", 1)
    top_k = work.width("order")
    if _is_up(work):
        columns //= 2
    constants: dict[str, Constant] = {
        "N": columns,
        "K": work.width("w", 2),
        "EXPERTS": experts,
        "TOP_K": top_k,
        "BLOCK_E": up2(experts + 1),
        "PRECISION": work.precision,
    }
    if work.is_fp8("w"):
        constants["BLOCK"] = BLOCK
    pairs = work.num_rows * top_k // max(experts, 1)
    depth = int(constants["K"])
    shapes = work.tiles(*_group_tiles(work, pairs, columns, depth))
    if work.quantised:
        shapes = [_quantised_tile(work, tile, depth) for tile in shapes]
    elif work.is_fp8("w"):
        shapes = [in_whole_blocks(tile, depth) for tile in shapes]
    tilings = [_grouped_tiling(work, tile, constants) for tile in dict.fromkeys(shapes)]
    if work.is_fp4("w"):
        return [moe_fp4_tiling.grouped_tiling(tiling) for tiling in tilings]
    return tilings


def _is_up(work: Work) -> bool:
    return work.kind == "grouped_up"


def _quantised_tile(work: Work, tile: Tile, depth: int) -> Tile:
    """A tile of FP8 by FP8: its rows stay in shared memory, or a block of the depth at a time."""
    deep = BLOCK
    if not _is_up(work) and tile.k >= depth:
        deep = depth
    return replace(tile, n=min(tile.n, BLOCK), k=deep)


def _staying_tiles(work: Work, pairs: int, depth: int) -> list[Tile]:
    """A tile whose rows stay, where they are many and short.

    On an H200 8,192 tokens take 279 us with it, and 375 with a block of the depth at a time (2,048
    x 512): the program reads its rows once, and the L2 cache gives half as many bytes.
    """
    if _is_up(work) or pairs <= MANY_PAIRS or depth > STAYING_DEPTH:
        return []
    return [Tile(128, 64, depth, 8, 3, splits=2)]


def _group_tiles(work: Work, pairs: int, columns: int, depth: int) -> list[Tile]:
    """Tiles for `pairs` (token, expert) pairs of each expert."""
    if work.is_fp4("w"):
        return moe_fp4_tiling.group_tiles(work, pairs)
    if work.interpreted:
        return [Tile(32, 64, 64, 8, 1)]
    if work.quantised and pairs > 32:
        wide = 64 if _is_up(work) else 128  # two sums of a tile, and that of a block
        ahead: list[Tile] = []
        if pairs > MANY_PAIRS:
            ahead = specialised_tiling.specialised_tile(work, columns, depth, _is_up(work))
        return [
            *ahead,
            *_staying_tiles(work, pairs, depth),
            Tile(64, wide, BLOCK, 4, 3),
            Tile(64, 64, BLOCK, 4, 3),
            Tile(64, 32, BLOCK, 4, 3),
        ]
    if pairs > 128:
        return [
            *specialised_tiling.specialised_tile(work, columns, depth, _is_up(work)),
            Tile(128, 128, 64, 8, 4),
            Tile(128, 64, 64, 8, 3),
            Tile(64, 64, 64, 4, 3),
            Tile(64, 32, 32, 4, 3),
        ]
    m = 64 if pairs > 16 else 16
    if m == 16 and work.is_fp8("w"):
        return [Tile(m, 64, 128, 4, 3), Tile(m, 32, 128, 4, 3), Tile(16, 32, 64, 4, 2)]
    tiles = [Tile(m, 64, 64, 4, 3), Tile(m, 32, 64, 4, 3), Tile(16, 32, 32, 4, 2)]
    if m == 16 and work.dtype == "bf16":
        # Of 16 rows on average half of the experts have more; tiles of 32 read their weights once.
        # On an H200 512 tokens take 252 us with them, and 284 with tiles of 16 (1,024 x 2,048).
        tiles.insert(0, Tile(32 if pairs > 8 else 16, 64, 128, 4, 3))
    if m == 64 and work.dtype == "bf16" and columns >= 128:
        tiles.insert(0, Tile(64, 128, 64, 4, 4))
    return tiles


def _grouped_tiling(work: Work, tile: Tile, constants: dict[str, Constant]) -> Tiling:
    if tile.num_warps == specialised_tiling.WARPS:
        return specialised_tiling.specialised_tiling(work, tile, constants, _is_up(work))
    columns, depth = int(constants["N"]), int(constants["K"])
    experts, top_k = int(constants["EXPERTS"]), int(constants["TOP_K"])
    # Each expert may end in a tile that is not full.
    tiles_m = GridDim(fixed=experts, scale=top_k, block=tile.m)
    if work.by_seqs:
        tiles_m = fixed(experts + blocks(work.num_rows * top_k, tile.m))
    of_program, sizes = tile.n, {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
    stays = work.quantised and tile.k > BLOCK
    if stays:
        of_program = blocks(columns, tile.n * tile.splits) * tile.n
        sizes["COLUMNS"] = of_program
    return Tiling(
        template="grouped_linear",
        constants=constants | sizes,
        grid=(fixed(blocks(columns, of_program)), tiles_m),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        options={
            "silu_mul": _is_up(work),
            "fp8": "BLOCK" in constants,
            "quantised": work.quantised,
            "stays": stays,
            "num_blocks": depth // BLOCK,
            "folds": tile.m >= FOLD_ROWS,
            "dtype": TRITON_DTYPES[work.dtype],
            "x": "x" if _is_up(work) else "h",
            "ragged": depth % tile.k != 0,
            "uneven": columns % tile.n != 0,
            "paired": _is_up(work) and not work.is_fp8("w") and tile.n <= 128,
            # Hopper's products take 64 rows at least, so a tile of 64 has no half.
            "halves": tile.m >= 128 or work.interpreted,
        },
    )
