"""Gated DeltaNet: one step, and the chunked form."""

from __future__ import annotations

from tokenspeed_plan.codegen.tiling import (
    L2_EPS,
    TRITON_DTYPES,
    Tiling,
    Work,
    fixed,
    per_rows,
    per_seq,
    rows_table,
    up2,
)
from tokenspeed_plan.codegen.tuned import Tile
from tokenspeed_plan.plans.ops import DELTA_CHUNK
from tokenspeed_plan.plans.schema import GridDim
from tokenspeed_plan.plans.types import Constant

SEQS = GridDim(per_seq=1)


def _heads(work: Work, kind: str) -> dict[str, Constant]:
    a, b, dk, dv = (
        work.size(kind, name) for name in ("num_k_heads", "num_v_heads", "key_dim", "value_dim")
    )
    return {"A": a, "B": b, "DK": dk, "DV": dv, "GROUP": b // a}


def _convolution(
    work: Work, heads: dict[str, Constant], x: str = "causal_conv_x"
) -> dict[str, Constant]:
    taps, channels = work.size("causal_conv", "kernel_size"), work.width(x)
    return {"TAPS": taps, "CHANNELS": channels, "L2_EPS": L2_EPS, "SCALE": int(heads["DK"]) ** -0.5}


def delta_step(work: Work) -> list[Tiling]:
    """One row a sequence, or several that leave a state each."""
    heads, rows = _heads(work, "delta_rule"), work.query_len
    facts = heads | _convolution(work, heads)
    table = work.specs[
        "causal_conv_dst_state_slots"
    ].shape  # of rows to write: one a sequence, or several
    dst_state_slots = work.width("causal_conv_dst_state_slots") if len(table) > 1 else 1
    template = "delta_step" if rows == 1 else "delta_steps"
    steps: dict[str, Constant] = {"ROWS": rows, "WRITE_ROWS": dst_state_slots, "BLOCK_R": up2(rows)}
    facts |= {"BLOCK_TAPS": up2(int(facts["TAPS"]))} if rows == 1 else steps
    return _by_columns(work, template, facts, {"dst_state_slots": dst_state_slots})


def delta_recompute(work: Work) -> list[Tiling]:
    """Any number of rows a sequence, which leave their inputs."""
    heads, rows = _heads(work, "delta_rule"), work.query_len
    facts = heads | _convolution(work, heads, "recompute_state_x")
    facts |= {
        "ROWS": rows,
        "KEPT": work.width("recompute_state_kept_inputs", 1),
        "BLOCK_R": up2(rows),
    }
    return _by_columns(work, "delta_recompute", facts, {})


def _by_columns(
    work: Work, template: str, facts: dict[str, Constant], options: dict[str, object]
) -> list[Tiling]:
    """A program a head and block of columns: a whole head's state would not stay in registers."""
    facts = facts | {"EPS": work.number("gated_norm", "eps")}
    wide, b, rows = int(facts["DV"]), int(facts["B"]), work.query_len
    made = []
    first = _columns_and_warps(work, template)
    shapes = (
        Tile(1, min(n, wide), int(facts["DK"]), warps, 1)
        for n, warps in (first, (64, 4), (32, 4), (16, 4), (8, 4))
    )
    for tile in work.tiles(*((Tile(1, wide, 0, 4, 1),) if work.interpreted else shapes)):
        n, columns = tile.n, wide // tile.n
        scratch = (
            {"partial": per_seq(rows * b * wide), "counters": per_seq(b, "i32")}
            if columns > 1
            else {}
        )
        grid = (SEQS, fixed(b), fixed(columns))
        chosen = options | {"columns": columns}
        made.append(
            Tiling(template, facts | {"BLOCK_V": n}, grid, tile.num_warps, 1, chosen, scratch, True)
        )
    return made


def _columns_and_warps(work: Work, template: str) -> tuple[int, int]:
    """As measured on an H200: for few heads many programs; for many, few that share what they compute of a head."""
    if template == "delta_step":
        return (16, 2) if work.num_seqs <= 2 else (64, 4) if work.num_seqs <= 8 else (32, 8)
    if template == "delta_recompute":
        return (16, 4) if work.num_seqs <= 2 else (32, 2) if work.num_seqs <= 4 else (64, 4)
    return (16, 2) if work.num_seqs <= 2 else (32, 2) if work.num_seqs <= 4 else (128, 4)


def conv_qk_norm(work: Work) -> list[Tiling]:
    """A program a head and block of tokens."""
    heads = _heads(work, "qk_l2_norm")
    facts = {name: heads[name] for name in ("A", "B", "DK", "DV")} | _convolution(work, heads)
    facts |= rows_table(work, "causal_conv_dst_state_slots")
    grid_heads = fixed(2 * int(heads["A"]) + int(heads["B"]))
    sizes = (64, 32, 16) if work.interpreted else (32, 16)
    return [
        Tiling("conv_qk_norm", facts | {"BLOCK_T": t}, (per_rows(t), grid_heads, SEQS), 4, 1)
        for t in sizes
    ]


def gates_delta_chunk(work: Work) -> list[Tiling]:
    """A program a head and chunk."""
    heads = _heads(work, "delta_chunk")
    facts = heads | {"CHUNK": DELTA_CHUNK, "BLOCK": 16, "PRECISION": work.precision}
    grid = (per_rows(DELTA_CHUNK), fixed(int(heads["B"])), SEQS)
    return [Tiling("gates_delta_chunk", facts, grid, warps, 1, _dtype(work)) for warps in (4, 8)]


def delta_scan(work: Work) -> list[Tiling]:
    """A program a head and block of columns of the state, through all chunks of a sequence."""
    heads = _heads(work, "delta_scan") | rows_table(work, "dst_state_slots")
    wide = int(heads["DV"])
    made = []
    for n, stages in ((32, 1),) if work.interpreted else ((32, 3), (32, 2), (16, 2), (16, 1)):
        columns = min(n, wide)
        facts = heads | {
            "CHUNK": DELTA_CHUNK,
            "PRECISION": work.precision,
            "BLOCK_V": columns,
            "STAGES": stages,
        }
        grid = (fixed(wide // columns), fixed(int(heads["B"])), SEQS)
        made.append(Tiling("delta_scan", facts, grid, 4, stages, _dtype(work)))
    return made


def _dtype(work: Work) -> dict[str, object]:
    """Products take operands in the dtype of the activations, and add up in fp32."""
    return {"dtype": TRITON_DTYPES[work.dtype]}


def gated_norm(work: Work) -> list[Tiling]:
    """A program a head and block of tokens."""
    block = 64 if work.interpreted else 16
    facts: dict[str, Constant] = {
        "HEADS": work.size("gated_norm", "num_heads"),
        "D": work.size("gated_norm", "head_dim"),
        "EPS": work.number("gated_norm", "eps"),
        "BLOCK_T": block,
    }
    return [
        Tiling(
            "gated_norm",
            facts,
            (per_rows(block), fixed(work.size("gated_norm", "num_heads"))),
            4,
            1,
        )
    ]
