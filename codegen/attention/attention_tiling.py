"""Attention: preparation of queries and keys, decode (few queries a sequence), prefill (many)."""

from __future__ import annotations

import math

from tokenspeed_plan.codegen.attention.rotary import frequencies
from tokenspeed_plan.codegen.tiling import Tiling, Work, blocks, fixed, per_rows, per_seq, up2
from tokenspeed_plan.codegen.tuned import Tile
from tokenspeed_plan.plans.schema import GridDim
from tokenspeed_plan.plans.types import Constant, TensorSpec

MIN_SPLIT_TOKENS = 64
MAX_SPLITS = 128
GROUP_SIZE = 8  # splits that are merged at once
LOG2_E = 1 / math.log(2)
MMA_ROWS = 16  # of the smallest tile of queries
MANY_QUERIES = 64  # queries of a tile that spill in few warps


def qk_norm_rope_write(work: Work) -> list[Tiling]:
    """A program for each head of each token."""
    inverse, magnitude = frequencies(
        work.size("rope", "rotary_dim"),
        work.number("rope", "theta"),
        work.number("rope", "factor"),
        work.size("rope", "original_max_positions"),
    )
    kv_heads = work.size("kv_write", "num_kv_heads")
    constants: dict[str, Constant] = {
        "KV": kv_heads,
        "D": work.size("rope", "head_dim"),
        "ROTARY": work.size("rope", "rotary_dim"),
        "PAGE": work.size("kv_write", "page_size"),
        "EPS": work.number("head_norm", "eps"),
    }
    q_heads = 0
    if work.kind != "k_norm_rope_write":
        q_heads = work.size("head_norm", "num_heads")
        constants["Q"] = q_heads
    tiling = Tiling(
        template="qk_norm_rope_write",
        constants=constants,
        grid=(per_rows(1, work.by_seqs), fixed(q_heads + kv_heads)),
        num_warps=1,
        num_stages=1,
        options={
            "frequencies": inverse,
            "magnitude": magnitude,
            "plain": work.plain_norm,
            "fp8": work.specs["kv_write_kv_cache"].dtype == "fp8",
            "scales": [_scale(work, "kv_write", name) for name in ("k_scale", "v_scale")],
        },
    )
    return [tiling]


def attention(work: Work) -> list[Tiling]:
    """Attention and its output gate where there is one, for decode or for prefill."""
    if work.part("attention").attrs["mode"] == "decode":
        return _decode(work)
    return _prefill(work)


def num_splits(work: Work, kv_heads: int, pages: int, splits_per_sm: int) -> int:
    """As many splits as give each multiprocessor `splits_per_sm` of them; 1 on a CPU."""
    programs = work.num_seqs * kv_heads
    max_tokens = pages * work.size("attention", "page_size")
    wanted = splits_per_sm * work.hardware.num_sms // programs
    return max(min(wanted, max_tokens // MIN_SPLIT_TOKENS, MAX_SPLITS), 1)


def _constants(work: Work) -> dict[str, Constant]:
    """Constants that decode and prefill share; exponents of the softmax are powers of 2."""
    q_heads = work.size("attention", "num_heads")
    kv_heads = work.size("attention", "num_kv_heads")
    head_dim = work.size("attention", "head_dim")
    return {
        "Q": q_heads,
        "KV": kv_heads,
        "D": head_dim,
        "GROUP": q_heads // kv_heads,
        "PAGE": work.size("attention", "page_size"),
        "PAGES": work.width("attention_page_table"),
        "SCALE": head_dim**-0.5 * LOG2_E * _scale(work, "attention", "k_scale"),
        "PRECISION": work.precision,
    }


def _decode(work: Work) -> list[Tiling]:
    """Few sequences would leave most of a GPU idle, so their keys are split.

    The depth of a tile is the number of splits for each multiprocessor; 0: two groups at most,
    whose merge leaves registers to many queries.
    """
    constants = _constants(work)
    queries = work.query_len * int(constants["GROUP"])
    constants["BLOCK_G"] = max(MMA_ROWS, up2(queries))
    if work.query_len > 1:
        constants["QUERY_LEN"] = work.query_len
    shapes = _decode_tiles(work, int(constants["BLOCK_G"]))
    return [_decode_tiling(work, tile, constants, queries) for tile in work.tiles(*shapes)]


def _decode_tiles(work: Work, block_g: int) -> list[Tile]:
    if work.interpreted:
        return [Tile(1, 64, 1, 8, 1)]
    later = Tile(1, 64, 1, 8, 2)
    if block_g >= MANY_QUERIES:
        smaller = [Tile(1, 32, 1, 8, 2), Tile(1, 16, 1, 8, 2), Tile(1, 16, 0, 8, 2)]
        return [Tile(1, 32, 1, 8, 3), later, *smaller]
    if _wide(work) and block_g > MMA_ROWS:  # what is converted needs registers
        return [Tile(1, 64, 1, 8, 3), Tile(1, 32, 1, 8, 2), Tile(1, 16, 1, 8, 2)]
    stages = 2 if block_g == MMA_ROWS else 3
    return [Tile(1, 64, 1, 8, stages), later, Tile(1, 32, 1, 4, 2), Tile(1, 16, 1, 4, 2)]


def _decode_tiling(work: Work, tile: Tile, constants: dict[str, Constant], queries: int) -> Tiling:
    kv_heads, pages = int(constants["KV"]), int(constants["PAGES"])
    splits = num_splits(work, kv_heads, pages, max(tile.k, 1))
    if tile.k == 0:
        splits = min(splits, 2 * GROUP_SIZE)
    grouping, scratch = _split_groups(work, constants, queries, splits)
    return Tiling(
        template="attention_decode",
        constants=constants | grouping | {"BLOCK_C": tile.n, "STAGES": tile.num_stages},
        grid=(per_rows(1, by_seqs=True), fixed(kv_heads), fixed(splits)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        options={
            "splits": splits,
            "query_len": work.query_len,
            "whole_pages": int(constants["PAGE"]) % tile.n == 0,
            "wide": _wide(work),
            "v_scale": _scale(work, "attention", "v_scale"),
        },
        scratch=scratch,
        # In a draft pass kernels that may still run write the keys, and even the context length.
        prefetches=work.specs["attention_q"].shape[0] == "num_tokens",
    )


def _split_groups(
    work: Work, constants: dict[str, Constant], queries: int, splits: int
) -> tuple[dict[str, Constant], dict[str, TensorSpec]]:
    """How splits are merged: constants, and the scratch through which programs exchange results."""
    if splits == 1:
        return {}, {}
    kv_heads, head_dim = int(constants["KV"]), int(constants["D"])
    groups = blocks(splits, GROUP_SIZE)
    # More queries have more to merge, so there are fewer splits of more tokens.
    min_tokens = MIN_SPLIT_TOKENS * max(up2(work.query_len) // 2, 1)
    grouping: dict[str, Constant] = {
        "SPLITS": splits,
        "GROUP_SIZE": GROUP_SIZE,
        "GROUPS": groups,
        "BLOCK_GROUPS": up2(groups),
        "BLOCK_H": up2(queries),
        "MIN_SPLIT_TOKENS": max(min_tokens, int(constants["PAGE"])),
        "BLOCK_S": max(GROUP_SIZE // up2(work.query_len), 1),
    }
    scratch = {
        "partial": per_seq(kv_heads * splits * queries * head_dim, work.dtype),
        "lse": per_seq(kv_heads * splits * queries),
        "group_partial": per_seq(kv_heads * groups * queries * head_dim, work.dtype),
        "group_lse": per_seq(kv_heads * groups * queries),
        "counters": per_seq(kv_heads * (groups + 1), "i32"),
    }
    return grouping, scratch


def _prefill(work: Work) -> list[Tiling]:
    """A program for a block of queries of one head, over all keys that they see."""
    shapes = [Tile(128, 64, 0, 8, 2), Tile(64, 64, 0, 8, 2), Tile(64, 32, 0, 8, 1)]
    if _wide(work):  # what is converted needs registers
        shapes = [Tile(128, 32, 0, 8, 2), Tile(64, 32, 0, 4, 2), Tile(64, 32, 0, 8, 1)]
    if work.interpreted:
        shapes = [Tile(64, 64, 0, 8, 1)]
    return [_prefill_tiling(work, tile, _constants(work)) for tile in work.tiles(*shapes)]


def _scale(work: Work, kind: str, name: str) -> float:
    """The scale of keys or values in FP8, a constant of a part of some kind."""
    if name not in work.part(kind).attrs:
        return 1.0
    return work.number(kind, name)


def _wide(work: Work) -> str:
    """What queries, and keys and values in FP8, are converted to; empty where they are alike.

    fp16 holds e4m3 exactly, in one instruction; of normed queries and weights of a softmax it keeps
    more digits than bf16.
    """
    if work.specs["attention_kv_cache"].dtype != "fp8":
        return ""
    if work.dtype == "fp32":
        return "tl.float32"
    return "tl.float16"


def _prefill_tiling(work: Work, tile: Tile, constants: dict[str, Constant]) -> Tiling:
    sizes = {"BLOCK_M": tile.m, "BLOCK_C": tile.n, "STAGES": tile.num_stages}
    return Tiling(
        template="attention_prefill",
        constants=constants | sizes,
        grid=(per_rows(tile.m), fixed(int(constants["Q"])), GridDim(per_seq=1)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        options={
            "whole_pages": int(constants["PAGE"]) % tile.n == 0,
            "wide": _wide(work),
            "v_scale": _scale(work, "attention", "v_scale"),
        },
    )
