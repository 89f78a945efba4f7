"""Attention: its preparation, one query a sequence, many queries."""

from __future__ import annotations

from tokenspeed_plan.planner.tiling.rotary import frequencies
from tokenspeed_plan.planner.tiling.work import Tiling, Work, fixed, per_rows, up2
from tokenspeed_plan.plans.schema import GridDim
from tokenspeed_plan.plans.types import Attr


def qk_norm_rope_write(work: Work) -> list[Tiling]:
    """A program for each head of each token."""
    rope = work.part("rope").attrs
    inverse, magnitude = frequencies(
        int(rope["rotary_dim"]), float(rope["theta"]), float(rope["factor"]), int(rope["original_max_positions"])
    )
    q, kv, d = work.size("split_gate", "num_heads"), work.size("kv_write", "num_kv_heads"), int(rope["head_dim"])
    constants: dict[str, Attr] = {
        "Q": q, "KV": kv, "D": d, "ROTARY": int(rope["rotary_dim"]), "PAGE": work.size("kv_write", "page_size"),
        "EPS": work.part("head_norm").attrs["eps"],
    }  # fmt: skip
    options = {"frequencies": inverse, "magnitude": magnitude}
    return [Tiling("qk_norm_rope_write", constants, (per_rows(1), fixed(q + kv)), 1, 1, options)]


def attention(work: Work) -> list[Tiling]:
    """Whole attention, gated: of one query a sequence or of many."""
    decode = work.part("attention").attrs["mode"] == "decode"
    return _decode(work, "attention", 1) if decode else _prefill(work)


def attention_split(work: Work) -> list[Tiling]:
    """Partial attention of one query a sequence."""
    return _decode(work, "attention_split", work.size("attention_split", "num_splits"))


def _facts(work: Work, kind: str) -> dict[str, Attr]:
    q, kv, d = (work.size(kind, name) for name in ("num_heads", "num_kv_heads", "head_dim"))
    pages = work.width("page_table" if "page_table" in work.specs else "attention_page_table")
    return {
        "Q": q, "KV": kv, "D": d, "GROUP": q // kv, "PAGE": work.size(kind, "page_size"), "PAGES": pages,
        "SCALE": d**-0.5, "PRECISION": work.precision,
    }  # fmt: skip


def _decode(work: Work, kind: str, splits: int) -> list[Tiling]:
    facts = _facts(work, kind)
    group = max(16, up2(int(facts["GROUP"])))
    made = []
    for c, warps, stages in ((64, 4, 1),) if work.interpreted else ((64, 4, 3), (64, 4, 2), (32, 4, 2), (32, 8, 1)):
        constants = facts | {"SPLITS": splits, "BLOCK_G": group, "BLOCK_C": c}
        grid = (per_rows(1, by_seqs=True), fixed(int(facts["KV"])), fixed(splits))
        made.append(Tiling("attention_decode", constants, grid, warps, stages, {"gate": kind == "attention"}))
    return made


def _prefill(work: Work) -> list[Tiling]:
    facts = _facts(work, "attention")
    made = []
    for m, c, warps, stages in (
        ((64, 64, 8, 1),) if work.interpreted else ((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1))
    ):
        constants = facts | {"BLOCK_M": m, "BLOCK_C": c}
        grid = (per_rows(m), fixed(int(facts["Q"])), GridDim(per_seq=1))
        made.append(Tiling("attention_prefill", constants, grid, warps, stages))
    return made
