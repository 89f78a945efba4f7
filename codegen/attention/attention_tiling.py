"""Attention: its preparation, one query a sequence, many queries."""

from __future__ import annotations

import math

from tokenspeed_plan.codegen.attention.rotary import frequencies
from tokenspeed_plan.codegen.tiling import Tiling, Work, blocks, fixed, per_rows, per_seq, up2
from tokenspeed_plan.codegen.tuned import Tile
from tokenspeed_plan.plans.schema import GridDim
from tokenspeed_plan.plans.types import Constant, TensorSpec

MIN_RUN = 64  # tokens of a split, at least
MAX_SPLITS = 128
FAN = 8  # splits that are put together at once
LOG2_E = 1 / math.log(2)


def qk_norm_rope_write(work: Work) -> list[Tiling]:
    """A program for each head of each token."""
    inverse, magnitude = frequencies(
        work.size("rope", "rotary_dim"),
        work.number("rope", "theta"),
        work.number("rope", "factor"),
        work.size("rope", "original_max_positions"),
    )
    q = work.size("split_gate", "num_heads") if work.has("split_gate") else 0
    kv, d = work.size("kv_write", "num_kv_heads"), work.size("rope", "head_dim")
    constants: dict[str, Constant] = {"Q": q} if q else {}
    constants |= {
        "KV": kv,
        "D": d,
        "ROTARY": work.size("rope", "rotary_dim"),
        "PAGE": work.size("kv_write", "page_size"),
        "EPS": work.number("head_norm", "eps"),
    }
    options = {"frequencies": inverse, "magnitude": magnitude}
    return [
        Tiling(
            "qk_norm_rope_write",
            constants,
            (per_rows(1, work.by_seqs), fixed(q + kv)),
            1,
            1,
            options,
        )
    ]


def attention(work: Work) -> list[Tiling]:
    """Whole attention, gated: of one query a sequence or of many."""
    return _decode(work) if work.part("attention").attrs["mode"] == "decode" else _prefill(work)


def num_splits(work: Work, kv_heads: int, pages: int, crowd: int) -> int:
    """As many as give each multiprocessor `crowd` parts of the keys; 1 on a CPU."""
    busy = work.num_seqs * kv_heads
    longest = pages * work.size("attention", "page_size")
    return max(min(crowd * work.hardware.num_sms // busy, longest // MIN_RUN, MAX_SPLITS), 1)


def _facts(work: Work) -> dict[str, Constant]:
    q, kv, d = (work.size("attention", name) for name in ("num_heads", "num_kv_heads", "head_dim"))
    return {
        "Q": q,
        "KV": kv,
        "D": d,
        "GROUP": q // kv,
        "PAGE": work.size("attention", "page_size"),
        "PAGES": work.width("attention_page_table"),
        "SCALE": d**-0.5,
        "PRECISION": work.precision,
    }


def _decode(work: Work) -> list[Tiling]:
    """Few sequences leave most of a GPU idle, so their keys are split; a tile's depth is splits a multiprocessor."""
    facts, rows = _facts(work), work.query_len
    heads = rows * int(facts["GROUP"])
    facts |= {"ROWS": rows} if rows > 1 else {}
    facts |= {"BLOCK_G": max(16, up2(heads)), "SCALE": float(facts["SCALE"]) * LOG2_E}
    # In a pass that drafts, keys and even the context come from kernels that may not be done.
    prefetches = work.specs["attention_q"].shape[0] == "num_tokens"
    made = []
    few, many = int(facts["BLOCK_G"]) == 16, int(facts["BLOCK_G"]) >= 64
    warps = 8 if many else 4  # so many queries spill in fewer
    first = Tile(1, 32 if many else 64, 1, 8, 2 if few else 3)
    shapes = (first, Tile(1, 64, 1, 8, 2), Tile(1, 32, 1, warps, 2), Tile(1, 16, 1, warps, 2))
    for tile in work.tiles(*((Tile(1, 64, 1, 8, 1),) if work.interpreted else shapes)):
        splits = num_splits(work, int(facts["KV"]), int(facts["PAGES"]), max(tile.k, 1))
        grouping, scratch = _split_groups(work, facts, heads, splits)
        constants = facts | grouping | {"BLOCK_C": tile.n, "STAGES": tile.num_stages}
        options = {"splits": splits, "rows": rows, "whole_pages": int(facts["PAGE"]) % tile.n == 0}
        grid = (per_rows(1, by_seqs=True), fixed(int(facts["KV"])), fixed(splits))
        stages = tile.num_stages
        made.append(
            Tiling(
                "attention_decode",
                constants,
                grid,
                tile.num_warps,
                stages,
                options,
                scratch,
                prefetches,
            )
        )
    return made


def _split_groups(
    work: Work, facts: dict[str, Constant], heads: int, splits: int
) -> tuple[dict[str, Constant], dict[str, TensorSpec]]:
    """How splits are put together: constants, and the scratch where they meet."""
    if splits == 1:
        return {}, {}
    kv, d, groups = int(facts["KV"]), int(facts["D"]), blocks(splits, FAN)
    constants: dict[str, Constant] = {
        "SPLITS": splits,
        "FAN": FAN,
        "GROUPS": groups,
        "BLOCK_T": up2(groups),
        "HEADS": up2(heads),
        # Of more rows there is more to put together, so it had better be of fewer splits.
        "MIN_RUN": max(MIN_RUN * max(up2(work.query_len) // 2, 1), int(facts["PAGE"])),
        "BLOCK_P": max(FAN // up2(work.query_len), 1),
    }
    return constants, {
        "partial": per_seq(kv * splits * heads * d, work.dtype),
        "lse": per_seq(kv * splits * heads),
        "group_partial": per_seq(kv * groups * heads * d, work.dtype),
        "group_lse": per_seq(kv * groups * heads),
        "counters": per_seq(kv * (groups + 1), "i32"),
    }


def _prefill(work: Work) -> list[Tiling]:
    """A block of queries of one head walks all keys that it sees."""
    facts = _facts(work)
    facts |= {"SCALE": float(facts["SCALE"]) * LOG2_E}
    shapes = (Tile(128, 64, 0, 8, 2), Tile(64, 64, 0, 8, 2), Tile(64, 32, 0, 8, 1))
    made = []
    for tile in work.tiles(*((Tile(64, 64, 0, 8, 1),) if work.interpreted else shapes)):
        constants = facts | {"BLOCK_M": tile.m, "BLOCK_C": tile.n, "STAGES": tile.num_stages}
        options = {"whole_pages": int(facts["PAGE"]) % tile.n == 0}
        grid = (per_rows(tile.m), fixed(int(facts["Q"])), GridDim(per_seq=1))
        made.append(
            Tiling("attention_prefill", constants, grid, tile.num_warps, tile.num_stages, options)
        )
    return made
