"""Gated DeltaNet: few tokens a sequence with the state in registers, and the chunked form."""

from __future__ import annotations

from tokenspeed_plan.codegen.tiling import (
    TRITON_DTYPES,
    Tiling,
    Work,
    dst_slots,
    fixed,
    per_rows,
    per_seq,
    quantising,
    up2,
)
from tokenspeed_plan.codegen.tuned import Tile
from tokenspeed_plan.plans.ops import DELTA_CHUNK, L2_EPS
from tokenspeed_plan.plans.schema import GridDim
from tokenspeed_plan.plans.types import Constant, TensorSpec

SEQS = GridDim(per_seq=1)
# (columns, warps) by (sequences at most), as measured on an H200: for few heads many programs; for
# many heads few programs, which share what they compute of a head. One program for a whole head
# meets no other one: it reads and writes 3.4 to 3.9 TB/s from 64 to 512 sequences.
COLUMNS_AND_WARPS = {
    "delta_step": {4: (16, 1)},
    "delta_steps": {2: (16, 2), 4: (32, 2)},
    "delta_recompute": {2: (16, 4), 4: (32, 2)},
}
ROW_OF_FOUR_WARPS = 4096  # elements of a row that four warps quantise, at most
TOKENS_AHEAD = 4  # that the convolution of a prompt loads before it uses them
MANY_SEQS = 128  # from here on two pieces of a head take 6 % less than the whole of it
MANY_COLUMNS_AND_WARPS = {
    "delta_step": (128, 4),
    "delta_steps": (128, 4),
    "delta_recompute": (64, 4),
}


def _heads(work: Work, kind: str) -> dict[str, Constant]:
    k_heads, v_heads = work.size(kind, "num_k_heads"), work.size(kind, "num_v_heads")
    return {
        "A": k_heads,
        "B": v_heads,
        "DK": work.size(kind, "key_dim"),
        "DV": work.size(kind, "value_dim"),
        "GROUP": v_heads // k_heads,
    }


def _conv_kind(work: Work) -> str:
    """The convolution of a kernel: with a ring where its plan writes the slot that it reads."""
    if work.has("ring_conv"):
        return "ring_conv"
    return "causal_conv"


def _convolution(
    work: Work, heads: dict[str, Constant], x: str | None = None
) -> dict[str, Constant]:
    """Constants of the convolution over `x`, and of the norm and scale of its queries."""
    kind = _conv_kind(work)
    x = x or f"{kind}_x"
    return {
        "TAPS": work.size(kind, "kernel_size"),
        "CHANNELS": work.width(x),
        "L2_EPS": L2_EPS,
        "SCALE": int(heads["DK"]) ** -0.5,
    }


def delta_step(work: Work) -> list[Tiling]:
    """One token a sequence, or several of which each leaves a snapshot."""
    heads = _heads(work, "delta_rule")
    constants = heads | _convolution(work, heads)
    slots = dst_slots(work, f"{_conv_kind(work)}_dst_state_slots")
    if work.query_len == 1:
        constants["BLOCK_TAPS"] = up2(int(constants["TAPS"]))
        return _by_columns(work, "delta_step", constants | slots)
    constants |= {"DST_SLOTS": 1} | slots
    return _by_columns(work, "delta_steps", constants | _queries(work))


def delta_recompute(work: Work) -> list[Tiling]:
    """Any number of tokens a sequence, which leave their inputs."""
    heads = _heads(work, "delta_rule")
    constants = heads | _convolution(work, heads, "recompute_state_x") | _queries(work)
    constants["KEPT_INPUTS"] = work.width("recompute_state_kept_inputs", 1)
    return _by_columns(work, "delta_recompute", constants)


def _queries(work: Work) -> dict[str, Constant]:
    return {"QUERY_LEN": work.query_len, "BLOCK_R": up2(work.query_len)}


def _by_columns(work: Work, template: str, constants: dict[str, Constant]) -> list[Tiling]:
    """A program a head and block of columns: a whole head's state would not stay in registers.

    A tile of all columns may take `k` of them at a time.
    """
    constants = constants | {"EPS": work.number("gated_norm", "eps")}
    key_dim, value_dim = int(constants["DK"]), int(constants["DV"])
    if work.interpreted:
        shapes = [Tile(1, value_dim, 0, 4, 1)]
    else:
        first = _columns_and_warps(work, template)
        sizes = (first, (64, 4), (32, 4), (16, 4), (8, 4))
        shapes = [Tile(1, min(n, value_dim), key_dim, warps, 1) for n, warps in sizes]
        if template == "delta_step" and first == (128, 4):
            shapes = _in_pieces(work, value_dim) + shapes
    return [_column_tiling(work, template, constants, tile) for tile in work.tiles(*shapes)]


def _in_pieces(work: Work, value_dim: int) -> list[Tile]:
    """A head in pieces of its columns, of which one is loaded while another is computed."""
    if work.stores_bf16_state:
        # 516 us for 512 sequences on an H200; a whole head at once spills, 64 columns take 712.
        return [Tile(1, value_dim, 16, 2, 1)]
    if work.num_seqs >= MANY_SEQS:
        return [Tile(1, value_dim, 64, 4, 1)]
    return []


def _column_tiling(work: Work, template: str, constants: dict[str, Constant], tile: Tile) -> Tiling:
    value_dim, v_heads = int(constants["DV"]), int(constants["B"])
    columns = value_dim // tile.n
    pieces = 1
    if template == "delta_step" and columns == 1 and 0 < tile.k < tile.n:
        pieces = tile.n // tile.k
        constants = constants | {"PIECES": pieces}
    scratch: dict[str, TensorSpec] = {}
    if columns > 1:
        scratch = {
            "partial": per_seq(work.query_len * v_heads * value_dim),
            "counters": per_seq(v_heads, "i32"),
        }
    grid = (SEQS, fixed(v_heads), fixed(columns))
    if template == "delta_step":
        grid = grid[::-1]  # neighbours read neighbouring memory
    return Tiling(
        template=template,
        constants=constants | {"BLOCK_V": tile.n // pieces},
        grid=grid,
        num_warps=tile.num_warps,
        num_stages=1,
        options={"columns": columns, "pieces": pieces, "conv_part": _conv_kind(work)},
        scratch=scratch,
        prefetches=True,
    )


def _columns_and_warps(work: Work, template: str) -> tuple[int, int]:
    for max_seqs, found in COLUMNS_AND_WARPS[template].items():
        if work.num_seqs <= max_seqs:
            return found
    return MANY_COLUMNS_AND_WARPS[template]


def conv_qk_norm(work: Work) -> list[Tiling]:
    """A program a head and block of tokens: `m` runs of `k` tokens."""
    heads = _heads(work, "qk_l2_norm")
    constants = heads | _convolution(work, heads)
    constants |= dst_slots(work, f"{_conv_kind(work)}_dst_state_slots")
    del constants["GROUP"]
    num_heads = 2 * int(heads["A"]) + int(heads["B"])
    shapes = [Tile(4, 1, 16, 4, 1), Tile(8, 1, 8, 4, 1)]  # as measured on an H200
    if work.interpreted:
        shapes = [Tile(32, 1, 2, 4, 1)]
    return [
        Tiling(
            template="conv_qk_norm",
            constants=constants
            | {"ROWS": tile.m, "STEPS": tile.k, "AHEAD": min(TOKENS_AHEAD, max(tile.k // 2, 1))},
            grid=(per_rows(tile.m * tile.k), fixed(num_heads), SEQS),
            num_warps=tile.num_warps,
            num_stages=1,
            options={"conv_part": _conv_kind(work)},
        )
        for tile in work.tiles(*shapes)
    ]


def gates_delta_chunk(work: Work) -> list[Tiling]:
    """A program a head and chunk."""
    constants = _heads(work, "delta_chunk")
    constants |= {
        "CHUNK": DELTA_CHUNK,
        "LEVELS": DELTA_CHUNK.bit_length() - 1,
        "PRECISION": work.precision,
    }
    return [
        Tiling(
            template="gates_delta_chunk",
            constants=constants,
            grid=(per_rows(DELTA_CHUNK), fixed(int(constants["B"])), SEQS),
            num_warps=num_warps,
            num_stages=1,
            options=_dtype(work),
        )
        for num_warps in (4, 8)
    ]


def delta_scan(work: Work) -> list[Tiling]:
    """A program a head and block of columns of the state, through all chunks of a sequence."""
    constants = _heads(work, "delta_scan") | dst_slots(work, "dst_state_slots")
    constants |= {"CHUNK": DELTA_CHUNK, "PRECISION": work.precision}
    value_dim, v_heads = int(constants["DV"]), int(constants["B"])
    sizes = [(32, 3), (32, 2), (16, 2), (16, 1)]
    if work.interpreted:
        sizes = [(32, 1)]
    tilings = []
    for block, stages in sizes:
        columns = min(block, value_dim)
        tiling = Tiling(
            template="delta_scan",
            constants=constants | {"BLOCK_V": columns, "STAGES": stages},
            grid=(fixed(value_dim // columns), fixed(v_heads), SEQS),
            num_warps=4,
            num_stages=stages,
            options=_dtype(work),
        )
        tilings.append(tiling)
    return tilings


def _dtype(work: Work) -> dict[str, object]:
    """Products take operands in the dtype of the activations, and accumulate in fp32."""
    return {"dtype": TRITON_DTYPES[work.dtype]}


def gated_norm_quantise(work: Work) -> list[Tiling]:
    """A program a token, so that the factors of its heads lie side by side."""
    heads, head_dim = work.size("gated_norm", "num_heads"), work.size("gated_norm", "head_dim")
    constants: dict[str, Constant] = {
        "HEADS": heads,
        "BLOCK_H": up2(heads),
        "D": head_dim,
        "EPS": work.number("gated_norm", "eps"),
    }
    num_warps = 4
    if up2(heads) * head_dim > ROW_OF_FOUR_WARPS:
        num_warps = 8
    tiling = Tiling(
        template="gated_norm_quantise",
        constants=constants | quantising(work),
        grid=(per_rows(1),),
        num_warps=num_warps,
        num_stages=1,
        options={"dtype": TRITON_DTYPES[work.dtype]},
    )
    return [tiling]


def gated_norm(work: Work) -> list[Tiling]:
    """A program a head and block of tokens."""
    heads = work.size("gated_norm", "num_heads")
    block = 64 if work.interpreted else 16
    tiling = Tiling(
        template="gated_norm",
        constants={
            "HEADS": heads,
            "D": work.size("gated_norm", "head_dim"),
            "EPS": work.number("gated_norm", "eps"),
            "BLOCK_T": block,
        },
        grid=(per_rows(block), fixed(heads)),
        num_warps=4,
        num_stages=1,
    )
    return [tiling]
