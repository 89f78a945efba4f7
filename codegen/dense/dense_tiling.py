"""Embedding, norms and products.

With few rows of x a product is bound by the weight's bytes and uses plain arithmetic; with more
rows it uses the tensor cores.
"""

from __future__ import annotations

from dataclasses import replace

from tokenspeed_plan.codegen.dense import fp4_tiling
from tokenspeed_plan.codegen.tiling import (
    FOLD_ROWS,
    GEMV_COLUMNS,
    GEMV_ROWS,
    RUN,
    TRITON_DTYPES,
    Tiling,
    Work,
    blocks,
    down2,
    fixed,
    id_columns,
    in_whole_blocks,
    per_rows,
    per_seq,
    per_token,
    quantising,
    run_warps,
    up2,
)
from tokenspeed_plan.codegen.tuned import Tile
from tokenspeed_plan.plans.fp8_format import BLOCK
from tokenspeed_plan.plans.peer_memory import (
    COUNT_LIMIT,
    ERROR,
    GENERATIONS,
    MAX_PUSH_PROGRAMS,
    STOP,
    slot_words,
)
from tokenspeed_plan.plans.schema import GridDim, Part
from tokenspeed_plan.plans.types import DTYPE_BITS, WARP_SIZE, Attr, Constant, TensorSpec

DOT_ROWS = 16  # of a tile on the tensor cores, at least
FEW_PUSHED = 128  # rows that run at once however many threads each of them has
# Rows from which on the sum of experts loads some ahead, in tiles of 64: 111 us for 132 on an H200.
SUMS_AHEAD = 8192
SMALL_BLOCK = 128  # threads
MANY_ROWS = 512  # from here a product waits for the tensor cores, not for its weights
BESIDE_COLUMNS = 2  # of a program, of a small product that shares the launch of a large one
MIN_FILL = 0.7  # programs a multiprocessor that keep a machine busy


def embed(work: Work) -> list[Tiling]:
    """A program a token and block of columns."""
    hidden = work.width("table")
    block = min(up2(hidden), 4096)
    tiling = Tiling(
        template="embed",
        constants={"VOCAB": work.width("table", 0), "H": hidden, "BLOCK_N": block},
        grid=(per_rows(1, work.by_seqs), fixed(blocks(hidden, block))),
        num_warps=4,
        num_stages=1,
        options={"columns": id_columns(work, "token_ids")},
    )
    return [tiling]


def add_norm(work: Work) -> list[Tiling]:
    """A program a token: its norm needs the whole row."""
    prefix = "rms_norm_" if len(work.kernel.parts) > 1 else ""
    hidden = work.width(f"{prefix}w")
    constants: dict[str, Constant] = {
        "H": hidden,
        "BLOCK_H": up2(hidden),
        "EPS": work.number("rms_norm", "eps"),
    }
    constants |= quantising(work)
    options = {
        "adds": work.has("add"),
        "norm": prefix,
        "plain": work.plain_norm,
        "quantises": work.has("quantise"),
        "dtype": TRITON_DTYPES[work.dtype],
    }
    return [
        Tiling(
            template="add_norm",
            constants=constants,
            grid=(per_rows(1, work.by_seqs),),
            num_warps=num_warps,
            num_stages=1,
            options=options,
        )
        for num_warps in (8, 4)
    ]


def quantise(work: Work) -> list[Tiling]:
    """A program for a block of columns of one row."""
    columns = work.width("x")
    block = min(up2(columns), 4096)
    constants: dict[str, Constant] = {
        "K": columns,
        "BLOCK_K": block,
    }
    tiling = Tiling(
        template="quantise",
        constants=constants | quantising(work),
        grid=(per_rows(1, work.by_seqs), fixed(blocks(columns, block))),
        num_warps=4,
        num_stages=1,
    )
    return [tiling]


def all_reduce(work: Work) -> list[Tiling]:
    """A program a row, where a thread has four times 16 bytes; of many rows each program has some.

    That was the fastest of one, two and four times on two H200 (rows of 8 KiB). A wait ends after
    `POLLS` polls, of about half a microsecond each, if nobody ends it before.
    """
    hidden, ranks = work.width("all_reduce_x"), work.size("all_reduce", "num_ranks")
    bits = DTYPE_BITS[work.dtype]
    slot = slot_words(hidden, bits) * 32 // bits
    constants: dict[str, Constant] = {
        "H": hidden,
        "BLOCK_H": up2(hidden),
        "WORLD": ranks,
        "SLOT": slot,
        "ROW": GENERATIONS * ranks * slot,
        "GENERATIONS": GENERATIONS,
        "COUNTS": COUNT_LIMIT,
        "TAGS": 1 << 14,
        "SIGN": -1 << (bits - 1),
        "MAGNITUDE": (1 << (bits - 1)) - 1,
        "POLLS": 1 << 27,
        "STOP": STOP,
        "ERROR": ERROR,
    }
    if work.has("rms_norm"):
        constants["EPS"] = work.number("rms_norm", "eps")
    options: dict[str, object] = {
        "adds": work.has("add"),
        "norm": work.has("rms_norm"),
        "plain": work.plain_norm,
        "summed": _summed(work),
        "dtype": TRITON_DTYPES[work.dtype],
        "bits": f"tl.int{bits}",
    }
    reduced = work.specs["all_reduce_x"]
    fewest = num_push_warps(reduced)
    warps = [fewest, 2 * fewest]
    if work.num_rows > FEW_PUSHED:
        warps = [fewest]
    grid, most = per_rows(1, work.by_seqs), most_pushed_at_once(reduced, work.hardware.num_sms)
    options["loops"] = work.num_rows > most
    if options["loops"]:
        grid = fixed(most)
    return [
        Tiling(
            template="all_reduce",
            constants=constants,
            grid=(grid,),
            num_warps=num_warps,
            num_stages=1,
            options=options,
            prefetches=True,
        )
        for num_warps in warps
    ]


def num_push_warps(tensor: TensorSpec) -> int:
    """Warps that push a row, 64 bytes a thread."""
    columns = tensor.bind(0, 0)[-1]
    row_bytes = columns * DTYPE_BITS[tensor.dtype] // 8
    return max(4, min(16, up2(row_bytes // (64 * WARP_SIZE))))


def most_pushed_at_once(tensor: TensorSpec, num_sms: int) -> int:
    """Programs that push rows of a tensor and certainly run at once, as they wait for their peers.

    Two on a multiprocessor where 128 threads have a row, else one: two times 128 threads with 255
    registers each fit into the 65,536 of a multiprocessor.

    Args:
        tensor: whose rows are added up.
        num_sms: multiprocessors; 0 where programs run one after the other.
    """
    if not num_sms:
        return MAX_PUSH_PROGRAMS
    programs_per_sm = 1
    if num_push_warps(tensor) * WARP_SIZE <= SMALL_BLOCK:
        programs_per_sm = 2
    return min(MAX_PUSH_PROGRAMS, programs_per_sm * num_sms)


def _summed(work: Work) -> str:
    """The output with the sum itself, empty where only its norm leaves the kernel."""
    for name in ("add_y", "all_reduce_y"):
        if name in work.outputs:
            return name
    return ""


def linear(work: Work) -> list[Tiling]:
    """The products of `linear.py.j2`, and of NVFP4 those of `linear_fp4.py.j2`."""
    if work.is_fp4(_weight(work)):
        return fp4_tiling.linear(work, _weight(work), _linear_options(work, dot=False))
    weight_rows, depth = work.width(_weight(work), 0), work.width(_weight(work), 1)
    columns = weight_rows
    if work.has("silu_mul"):
        columns = weight_rows // 2
    rows = work.num_rows
    is_fp8 = work.is_fp8(_weight(work))
    is_router = rows <= 2 * DOT_ROWS and weight_rows <= GEMV_COLUMNS and not is_fp8
    if work.interpreted:
        tiles = [_interpreted_tile(work, rows, columns, depth)]
    elif rows <= GEMV_ROWS or is_router:
        tiles = _gemv_tiles(work, rows, weight_rows, depth)
    elif work.quantised:
        tiles = _quantised_tiles(work, rows, columns)
    else:
        tiles = _matrix_tiles(work, rows, weight_rows, columns)
    if is_fp8 and not work.interpreted:
        tiles = [_in_blocks(work, tile, columns, depth) for tile in tiles]
    tiles = work.tiles(*tiles)
    if is_fp8:
        tiles = list(dict.fromkeys(_in_one_block(tile, depth) for tile in tiles))
    if work.quantised:
        tiles = [replace(tile, m=max(tile.m, DOT_ROWS), k=BLOCK) for tile in tiles]
    return [_linear_tiling(work, tile, rows, columns, depth) for tile in tiles]


def _in_one_block(tile: Tile, depth: int) -> Tile:
    """The tile with rows of one block, and whole blocks of the depth."""
    if tile.m < DOT_ROWS:
        return replace(tile, n=min(tile.n, BLOCK), k=max(tile.k, BLOCK), num_stages=1)
    return in_whole_blocks(tile, depth)


def _in_blocks(work: Work, tile: Tile, columns: int, depth: int) -> Tile:
    """A tile of the rules made good for FP8.

    In plain arithmetic each thread has a run of a row, and a loop over the depth is not pipelined:
    through shared memory it takes 114 us where 18 would do (1 row times 20,480 x 3,072). On the
    tensor cores a tile is within one block, and with few rows programs share the depth, so that
    three of them keep a multiprocessor reading, as measured on an H200 (16 rows times 2,048 x
    4,096: 5 us less with four programs of 64 columns than with two).
    """
    if tile.m < DOT_ROWS:
        k, warps = run_warps(depth)
        most = 4
        if work.has("rms_norm") and not work.has("silu_mul"):
            most = 8  # each program norms x; half of them take 4 % less of a step of 122B
        return replace(tile, n=min(tile.n, most), k=k, num_warps=warps, num_stages=1)
    if tile.m <= 2 * DOT_ROWS:
        wanted = 3 * work.hardware.num_sms // blocks(columns, 64)
        return Tile(tile.m, 64, BLOCK, 4, 6, splits=max(min(wanted, depth // BLOCK // 2, 4), 1))
    if tile.k > BLOCK:
        return replace(tile, n=min(tile.n, 16), k=BLOCK, num_stages=5)
    return tile


def _weight(work: Work) -> str:
    if "linear_w" in work.specs:
        return "linear_w"
    return "w"


def _interpreted_tile(work: Work, rows: int, columns: int, depth: int) -> Tile:
    if rows <= GEMV_ROWS:
        max_columns = 16 if work.has("silu_mul") else 32
        return Tile(up2(rows), min(up2(columns), max_columns), min(up2(depth), 256), 8, 1)
    if rows <= 16:
        return Tile(16, 64, 64, 8, 1)
    return Tile(64, 64, 64, 8, 1)


def _gemv_tiles(work: Work, rows: int, weight_rows: int, depth: int) -> list[Tile]:
    """Tiles that keep all multiprocessors reading weights, as measured on an H200."""
    m, sms, block = up2(rows), work.hardware.num_sms, _unmasked_depth(depth)
    max_columns = 8 if m == 1 else 4
    columns = max(1, min(max_columns, down2(weight_rows // (4 * sms))))
    if m > GEMV_ROWS:  # a router
        first = Tile(min(m, 8), 2, block, 8, 3)
    elif m > 1:
        first = Tile(m, columns, min(block, 512), 2, 3)
    elif work.has("silu_mul"):
        first = Tile(m, max(columns // 2, 1), min(block, 512), 4, 3)
    elif weight_rows >= 16 * sms and work.has("rms_norm"):
        first = Tile(m, columns, min(block, 256), 2, 1)
    elif columns > 2:
        first = Tile(m, columns, min(block, 1024), 4, 2)
    else:
        first = Tile(m, columns, min(block, 1024), 2, 2)
    return [first, Tile(min(m, 8), 1, min(block, 512), 4, 1)]


def _unmasked_depth(depth: int) -> int:
    """A power of two that divides the depth, so that no load is masked; any if those are small."""
    divisor = min(depth & -depth, 1024)
    if divisor >= 128:
        return divisor
    return min(up2(depth), 1024)


def _elements(work: Work, size_bytes: int) -> int:
    """Elements of the activations' dtype in so many bytes."""
    return size_bytes // (DTYPE_BITS[work.dtype] // 8)


def _matrix_tiles(work: Work, rows: int, weight_rows: int, columns: int) -> list[Tile]:
    if rows <= 2 * DOT_ROWS:
        return _skinny_tiles(work, rows, weight_rows)
    programs = blocks(rows, 128) * blocks(columns, 128)
    if rows < MANY_ROWS or programs < MIN_FILL * work.hardware.num_sms:
        return _few_tiles(work, rows, columns)
    n, k = 256, _elements(work, 128)
    if work.has("silu_mul") or columns * rows < 128 * 256 * work.hardware.num_sms:
        n = 128
    return [
        Tile(128, n, k, 8, 4),
        Tile(128, n, k, 8, 3),
        Tile(128, n // 2, k, 8, 4),
        Tile(128, n // 2, k, 8, 3),
        Tile(64, 64, 64, 8, 3),
        Tile(64, 32, 32, 4, 2),
    ]


def _skinny_tiles(work: Work, rows: int, weight_rows: int) -> list[Tile]:
    """Few rows of x: a few programs on each multiprocessor read long pieces of the weight."""
    m, n = max(up2(rows), DOT_ROWS), 16
    if weight_rows >= 24 * work.hardware.num_sms:
        n = 32
    num_warps = 2 if m == DOT_ROWS else 4
    return [
        Tile(m, n, _elements(work, 512), num_warps, 4),
        Tile(m, 32, 128, 4, 3),
        Tile(m, 16, 128, 4, 3),
        Tile(16, 16, 64, 4, 2),
    ]


def _few_tiles(work: Work, rows: int, columns: int) -> list[Tile]:
    """The largest tiles that still fill the machine, as measured on an H200; then smaller ones."""
    wide, deep = _elements(work, 512), _elements(work, 256)
    sizes = [
        Tile(16, 16, wide, 8, 3),
        Tile(64, 16, wide, 8, 3),
        Tile(64, 32, deep, 4, 3),
        Tile(64, 64, deep, 4, 3),
        Tile(128, 64, deep // 2, 8, 3),
        Tile(128, 128, deep // 2, 8, 3),
    ]
    filling = filling_tile(rows, columns, work.hardware.num_sms)
    first = next(tile for tile in sizes if (tile.m, tile.n) == filling)
    if is_narrow(rows, columns) and not work.has("rms_norm"):
        m, n, splits = NARROW_TILE
        first = Tile(m, n, deep, 4, 4, splits=splits)
    return [first, Tile(64, 32, 64, 4, 3), Tile(32, 32, 32, 4, 2)]


def filling_tile(rows: int, columns: int, num_sms: int) -> tuple[int, int]:
    """Rows and columns of the largest tile that still fills a machine, of more than 32 rows of x.

    The planner prices products by it (`planner/passes/cost.py`).
    """
    found, *larger = (16, 16), (64, 16), (64, 32), (64, 64), (128, 64), (128, 128)
    for m, n in larger:
        if m < 2 * rows and blocks(rows, m) * blocks(columns, n) >= MIN_FILL * num_sms:
            found = m, n
    return found


# A router has few tiles, so two programs share the depth of each. On an H200 that is the best or
# nearly so from 64 to 512 rows of 257 columns; more of them wait for each other.
NARROW_TILE = (64, 32, 2)


def is_narrow(rows: int, columns: int) -> bool:
    """Whether a product has so few columns, as that of a router, and more than 32 rows of x."""
    return 2 * DOT_ROWS < rows <= MANY_ROWS and columns <= GEMV_COLUMNS


def shares_depth(rows: int, columns: int, num_sms: int) -> bool:
    """Whether four programs share the depth of a tile of FP8 times FP8."""
    return blocks(rows, 64) * blocks(columns, 64) < 2 * num_sms


def _quantised_tiles(work: Work, rows: int, columns: int) -> list[Tile]:
    """Tiles of FP8 times FP8: a block of the depth at a time, with a sum of its own."""
    if shares_depth(rows, columns, work.hardware.num_sms):
        return [Tile(64, 64, BLOCK, 4, 3, splits=4), Tile(64, 32, BLOCK, 4, 3)]
    wide = 64 if work.has("silu_mul") else 128  # two sums of a tile, and that of a block
    return [Tile(64, wide, BLOCK, 4, 4), Tile(64, 64, BLOCK, 4, 3), Tile(64, 32, BLOCK, 4, 3)]


def _linear_tiling(work: Work, tile: Tile, rows: int, columns: int, depth: int) -> Tiling:
    constants: dict[str, Constant] = {
        "N": columns,
        "K": depth,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
    }
    dot = tile.m >= DOT_ROWS
    is_fp8 = work.is_fp8(_weight(work))
    if is_fp8:
        constants["BLOCK"] = BLOCK
    if is_fp8 and not dot:
        constants["RUN"] = RUN
    else:
        constants["STAGES"] = tile.num_stages
    if dot:
        constants |= {"PRECISION": work.precision} | _tile_groups(work, rows)
    splits = _splits(work, tile, depth)
    if splits > 1:
        constants |= {"SPLITS": splits, "SPLIT_K": blocks(depth, tile.k * splits) * tile.k}
    if work.has("rms_norm"):
        constants["EPS"] = work.number("rms_norm", "eps")
    if work.has("expert_sum"):
        constants["TOP_K"] = work.width("expert_sum_weights")
        if rows >= SUMS_AHEAD and tile.m == 64:
            constants["SUM_STAGES"] = 4
    tiles_n = blocks(columns, tile.n)
    beside = _beside(work)
    if beside:
        constants |= _beside_sizes(work, beside, depth) | {"TILES": tiles_n}
        tiles_n += blocks(int(constants["BESIDE"]), BESIDE_COLUMNS)
    tiles_m = GridDim(block=tile.m)
    if work.by_seqs:  # for as many sequences as there may be: tiles past the last write nothing
        tiles_m = fixed(blocks(rows, tile.m))
    return Tiling(
        template="linear",
        constants=constants,
        grid=(fixed(tiles_n), tiles_m, fixed(splits))[: 2 + (splits > 1)],
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        options=_linear_options(work, dot)
        | {"ragged": depth % tile.k != 0, "folds": tile.m >= FOLD_ROWS, "splits": splits},
        scratch=_split_scratch(work, tile, columns, splits),
        prefetches=not dot,
    )


def _beside(work: Work) -> Part | None:
    """A second product of the same x, where the kernel has one."""
    products = [part for part in work.kernel.parts if part.kind == "linear"]
    if len(products) > 1:
        return products[1]
    return None


def _beside_sizes(work: Work, beside: Part, depth: int) -> dict[str, Constant]:
    """Columns of the second product, and the tile of its programs."""
    return {
        "BESIDE": work.width(beside.operands[1], 0),
        "BESIDE_N": BESIDE_COLUMNS,
        "BESIDE_K": min(up2(depth), 2048),
    }


def _splits(work: Work, tile: Tile, depth: int) -> int:
    """Programs that share a depth, each with at least one step of it; a norm needs all of it."""
    if tile.m < DOT_ROWS or tile.splits == 1 or work.has("rms_norm"):
        return 1
    steps = blocks(depth, tile.k)
    return blocks(steps, blocks(steps, tile.splits))


def _split_scratch(work: Work, tile: Tile, columns: int, splits: int) -> dict[str, TensorSpec]:
    """Where programs that share a depth leave their sums, and a counter for each tile."""
    if splits == 1:
        return {}
    each = per_token
    if work.by_seqs:
        each = per_seq
    sums = 1 + work.has("silu_mul")
    return {
        "partial": each(sums * splits * columns),
        "counters": each(blocks(columns, tile.n), "i32"),
    }


def _tile_groups(work: Work, rows: int) -> dict[str, Constant]:
    """With many rows, how many tiles of them run side by side.

    Measured on an H200: groups of 4 and 8 are 5 and 2 % slower than 16.
    """
    if work.interpreted and rows > DOT_ROWS:
        return {"GROUP_M": 2}
    if not work.interpreted and rows >= MANY_ROWS:
        return {"GROUP_M": 16}
    return {}


def _linear_options(work: Work, dot: bool) -> dict[str, object]:
    beside = _beside(work)
    options: dict[str, object] = {"beside": None}
    if beside:
        names = beside.outputs
        options |= {
            "beside": beside.operands[1],
            "beside_outputs": _outputs(names, beside.attrs["splits"]),
        }
    inner = ("rms_norm_y", *(beside.outputs if beside else ()))
    names = tuple(name for name in work.outputs if name not in inner)
    return options | {
        "x": _product_input(work),
        "dot": dot,
        "fp8": work.is_fp8(_weight(work)),
        "quantised": work.quantised,
        "norm": work.has("rms_norm"),
        "plain": work.plain_norm,
        "gather": work.has("last_token"),
        "silu_mul": work.has("silu_mul"),
        "expert_sum": work.has("expert_sum"),
        "add": work.has("add"),
        "dtype": TRITON_DTYPES[work.dtype],
        "weight_name": _weight(work),
        "outputs": _outputs(names, work.part("linear").attrs["splits"]),
    }


def _product_input(work: Work) -> str:
    """The parameter that holds x."""
    if work.has("rms_norm"):
        return "rms_norm_x"
    if work.has("last_token"):
        return "last_token_x"
    if "linear_x" in work.specs:
        return "linear_x"
    return "x"


def _outputs(names: tuple[str, ...], sizes: Attr) -> list[tuple[str, int, int]]:
    """(name, first column, columns) of each output of a product."""
    if len(names) == 1:
        return [(names[0], 0, 0)]
    assert isinstance(sizes, tuple)
    outputs, start = [], 0
    for name, size in zip(names, sizes, strict=True):
        outputs.append((name, start, size))
        start += size
    return outputs
