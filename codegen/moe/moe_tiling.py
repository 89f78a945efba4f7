"""Mixture of experts: a few rows, and the sort before many."""

from __future__ import annotations

from tokenspeed_plan.codegen.tiling import Tiling, Work, blocks, fixed, per_rows, up2
from tokenspeed_plan.codegen.tuned import Tile
from tokenspeed_plan.plans.schema import GridDim
from tokenspeed_plan.plans.types import Constant


def _choice(work: Work, logits: str) -> dict[str, Constant]:
    experts, top_k = work.width(logits), work.size("topk", "top_k")
    return {"EXPERTS": experts, "TOP_K": top_k, "BLOCK_E": up2(experts)}


def topk(work: Work) -> list[Tiling]:
    """A program a token."""
    facts = _choice(work, "logits") | {"BLOCK_J": up2(work.size("topk", "top_k"))}
    return [Tiling("topk", facts, (per_rows(1, work.by_seqs),), 1, 1)]


def moe_up(work: Work) -> list[Tiling]:
    """A program for some channels of one expert of one token, tokens side by side; the shared expert is one more."""
    local, inner, hidden = (
        work.width("experts_up_w", 0),
        work.width("experts_up_w", 1) // 2,
        work.width("experts_up_w"),
    )
    shared = work.width("linear_w", 0) // 2
    narrow = work.specs["topk_logits"].dtype == "bf16"
    facts = _choice(work, "topk_logits") | {
        "LOCAL": local,
        "INNER": inner,
        "SHARED": shared,
        "H": hidden,
    }
    facts |= {"BLOCK_J": up2(int(facts["TOP_K"]))} if "topk_ids" in work.outputs else {}
    options, trigger_after_wait = (
        {"narrow": narrow},
        "topk_ids" not in work.outputs,
    )  # the way down chooses for itself
    made = []
    deep = max(min(hidden & -hidden, 2048), 256)  # no load is masked
    warps = 4 if work.num_tokens == 1 else 2
    shapes = (
        Tile(1, min(8192 // deep, 8), deep, warps, 2),
        Tile(1, 4, 256, 4, 2),
        Tile(1, 2, 256, 4, 1),
    )
    for shape in work.tiles(*((Tile(1, 32, 128, 8, 1),) if work.interpreted else shapes)):
        n = min(shape.n, up2(max(inner, shared)))
        tile: dict[str, Constant] = {
            "BLOCK_N": n,
            "BLOCK_K": min(shape.k, up2(hidden)),
            "STAGES": shape.num_stages,
        }
        grid = (
            per_rows(1, work.by_seqs),
            fixed(int(facts["TOP_K"]) + 1),
            fixed(blocks(max(inner, shared), n)),
        )
        stages = shape.num_stages
        made.append(
            Tiling(
                "moe_up",
                facts | tile,
                grid,
                shape.num_warps,
                stages,
                options,
                trigger_after_wait=trigger_after_wait,
            )
        )
    return made


def moe_down(work: Work) -> list[Tiling]:
    """A program for some columns of one token, over all its experts."""
    local, hidden, inner = (work.width("experts_down_w", dim) for dim in range(3))
    shared: Constant = work.width("linear_w")
    facts: dict[str, Constant] = {"LOCAL": local, "INNER": inner, "H": hidden, "SHARED": shared}
    options: dict[str, object] = {"add": work.has("add"), "recompute": work.has("topk")}
    prefetch: tuple[str, ...] = ()
    if work.has("topk"):
        facts |= _choice(work, "topk_logits")
        options |= {"narrow": work.specs["topk_logits"].dtype == "bf16"}
        prefetch = ("topk_logits",)  # made before the way up, which starts its successor late
    else:
        facts |= {"TOP_K": work.width("experts_down_weights")}
    made = []
    first = Tile(1, 2, 512, 2, 1) if work.num_tokens == 1 else Tile(1, 1, 256, 2, 1)
    shapes = (first, Tile(1, 4, 256, 4, 1))
    for shape in work.tiles(*((Tile(1, 64, 128, 8, 1),) if work.interpreted else shapes)):
        tile: dict[str, Constant] = {
            "BLOCK_N": min(shape.n, up2(hidden)),
            "BLOCK_K": min(shape.k, up2(max(inner, int(facts["SHARED"])))),
        }
        grid = (per_rows(1, work.by_seqs), fixed(blocks(hidden, int(tile["BLOCK_N"]))))
        made.append(
            Tiling(
                "moe_down",
                facts | tile,
                grid,
                shape.num_warps,
                1,
                options,
                prefetches=True,
                prefetch=prefetch,
            )
        )
    return made


def expert_sort(work: Work) -> list[Tiling]:
    """A program an expert."""
    experts = work.size("expert_sort", "num_experts")
    top_k = work.width("ids")
    block = (
        1024 if work.interpreted else min(up2(work.num_rows * top_k), 8192)
    )  # as measured on an H200
    facts: dict[str, Constant] = {"EXPERTS": experts, "TOP_K": top_k, "BLOCK": block}
    return [
        Tiling("expert_sort", facts, (GridDim(fixed=experts + 1),), 8 if block > 1024 else 4, 1)
    ]
