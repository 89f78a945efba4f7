"""Attention: its preparation, one query a sequence, many queries."""

from __future__ import annotations

import math

from tokenspeed_plan.planner.tiling.rotary import frequencies
from tokenspeed_plan.planner.tiling.tuned import Tile
from tokenspeed_plan.planner.tiling.work import Tiling, Work, fixed, per_rows, per_seq, up2
from tokenspeed_plan.plans.schema import GridDim
from tokenspeed_plan.plans.types import Attr

MIN_RUN = 64  # tokens of a split, at least
MAX_SPLITS = 128
LOG2_E = 1 / math.log(2)


def qk_norm_rope_write(work: Work) -> list[Tiling]:
    """A program for each head of each token."""
    rope = work.part("rope").attrs
    inverse, magnitude = frequencies(
        int(rope["rotary_dim"]), float(rope["theta"]), float(rope["factor"]), int(rope["original_max_positions"])
    )
    q = work.size("split_gate", "num_heads") if work.has("split_gate") else 0
    kv, d = work.size("kv_write", "num_kv_heads"), int(rope["head_dim"])
    constants: dict[str, Attr] = {"Q": q} if q else {}
    constants |= {
        "KV": kv, "D": d, "ROTARY": int(rope["rotary_dim"]), "PAGE": work.size("kv_write", "page_size"),
        "EPS": work.part("head_norm").attrs["eps"],
    }  # fmt: skip
    options = {"frequencies": inverse, "magnitude": magnitude}
    return [Tiling("qk_norm_rope_write", constants, (per_rows(1, work.by_seqs), fixed(q + kv)), 1, 1, options)]


def attention(work: Work) -> list[Tiling]:
    """Whole attention, gated: of one query a sequence or of many."""
    return _decode(work) if work.part("attention").attrs["mode"] == "decode" else _prefill(work)


def num_splits(work: Work, kv_heads: int, pages: int) -> int:
    """As many as give each multiprocessor a part of the keys; 1 on a CPU."""
    busy = work.num_seqs * kv_heads
    longest = pages * int(work.part("attention").attrs["page_size"])
    return max(min(work.hardware.num_sms // busy, longest // MIN_RUN, MAX_SPLITS), 1)


def _facts(work: Work) -> dict[str, Attr]:
    q, kv, d = (work.size("attention", name) for name in ("num_heads", "num_kv_heads", "head_dim"))
    return {
        "Q": q, "KV": kv, "D": d, "GROUP": q // kv, "PAGE": work.size("attention", "page_size"),
        "PAGES": work.width("attention_page_table"), "SCALE": d**-0.5, "PRECISION": work.precision,
    }  # fmt: skip


def _decode(work: Work) -> list[Tiling]:
    """Few sequences leave most of a GPU idle, so their keys are split."""
    facts = _facts(work)
    group, kv, d = (int(facts[name]) for name in ("GROUP", "KV", "D"))
    rows, splits = work.rows_per_seq, num_splits(work, kv, int(facts["PAGES"]))
    facts |= {"ROWS": rows} if rows > 1 else {}
    facts |= {"BLOCK_G": max(16, up2(rows * group)), "SCALE": float(facts["SCALE"]) * LOG2_E}
    if splits > 1:
        facts |= {
            "SPLITS": splits,
            "BLOCK_S": up2(splits),
            # Of more rows the last split has more to put together, so it had better be of fewer splits.
            "MIN_RUN": max(MIN_RUN * max(up2(rows) // 2, 1), int(facts["PAGE"])),
            "HEADS": up2(rows * group),
            "BLOCK_P": min(up2(splits), max(8 // up2(rows), 1)),
        }
    scratch = {
        "partial": per_seq(kv * splits * rows * group * d, work.dtype), "lse": per_seq(kv * splits * rows * group),
        "tickets": per_seq(kv, "i32"),
    }  # fmt: skip
    # In a pass that drafts, keys and even the context come from kernels that may not be done.
    ahead = work.specs["attention_q"].shape[0] == "num_tokens"
    made = []
    warps = 4 if int(facts["BLOCK_G"]) < 64 else 8  # so many queries spill in fewer
    shapes = (Tile(1, 64, 0, 8, 3), Tile(1, 64, 0, 8, 2), Tile(1, 32, 0, warps, 2), Tile(1, 16, 0, warps, 2))
    for tile in work.tiles(*((Tile(1, 64, 0, 8, 1),) if work.interpreted else shapes)):
        constants = facts | {"BLOCK_C": tile.n, "STAGES": tile.num_stages}
        options = {"splits": splits, "rows": rows, "whole_pages": int(facts["PAGE"]) % tile.n == 0}
        grid = (per_rows(1, by_seqs=True), fixed(kv), fixed(splits))
        meet, stages = scratch if splits > 1 else {}, tile.num_stages
        made.append(Tiling("attention_decode", constants, grid, tile.num_warps, stages, options, meet, ahead))
    return made


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
        made.append(Tiling("attention_prefill", constants, grid, tile.num_warps, tile.num_stages, options))
    return made
