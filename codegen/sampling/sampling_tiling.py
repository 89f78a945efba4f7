"""The ends of a program: tokens in, tokens out; and sums over ranks."""

from __future__ import annotations

from tokenspeed_plan.codegen.tiling import (
    TRITON_DTYPES,
    Tiling,
    Work,
    blocks,
    fixed,
    per_rows,
    per_seq,
    per_token,
    rows_table,
    up2,
)
from tokenspeed_plan.plans.ops import query_len
from tokenspeed_plan.plans.types import Constant, TensorSpec

INDEX_BITS = 20  # of a key: vocabularies up to a million


def embed(work: Work) -> list[Tiling]:
    """A program a token and block of columns."""
    rows, hidden = work.width("table", 0), work.width("table")
    block = min(up2(hidden), 4096)
    facts: dict[str, Constant] = {"ROWS": rows, "H": hidden, "BLOCK_N": block}
    options: dict[str, object] = {"columns": id_columns(work, "token_ids")}
    return [
        Tiling(
            "embed", facts, (per_rows(1, work.by_seqs), fixed(blocks(hidden, block))), 4, 1, options
        )
    ]


def id_columns(work: Work, token_ids: str) -> int:
    """Of token ids, a row a sequence; 1 where they are a list."""
    return work.width(token_ids) if len(work.specs[token_ids].shape) == 2 else 1


def advance(work: Work) -> list[Tiling]:
    """One program: it is a few numbers a sequence."""
    facts: dict[str, Constant] = {
        "PAGE": work.size("advance", "page_size"),
        "PAGES": work.width("page_table"),
        "BLOCK": up2(work.num_seqs),
    }
    facts |= rows_table(work, "dst_state_slots")
    return [Tiling("advance", facts, (fixed(1),), 1, 1)]


def sample(work: Work) -> list[Tiling]:
    """A program a row and part of the vocabulary; the last to end draws."""
    rows = query_len(work.part("sample").attrs)
    facts, parts, scratch = best_token(work, "logits")
    facts |= {"VALID": work.size("sample", "num_valid_tokens"), "INDEX_BITS": INDEX_BITS}
    facts |= {"ROWS": rows} if rows > 1 else {}
    grid = (per_rows(1, work.by_seqs), fixed(parts))
    return [
        Tiling("sample", facts, grid, warps, 1, {"shares": parts}, scratch) for warps in (16, 32)
    ]


def best_token(work: Work, logits: str) -> tuple[dict[str, Constant], int, dict[str, TensorSpec]]:
    """Constants, parts of the vocabulary, and where the programs of a row meet, of a search for its best token."""
    vocab = work.width(logits)
    block = min(up2(vocab), 8192) if work.interpreted else max(up2(vocab) // 32, 256)
    parts = 1 if work.interpreted else blocks(vocab, block)
    facts: dict[str, Constant] = {"VOCAB": vocab, "BLOCK": block}
    if parts == 1:
        return facts, parts, {}
    facts |= {"PARTS": parts, "BLOCK_P": up2(parts), "RUN": block}
    each = per_seq if work.by_seqs else per_token
    return (
        facts,
        parts,
        {"bests": each(parts), "tokens": each(parts, "i32"), "counters": each(1, "i32")},
    )


def add_norm(work: Work) -> list[Tiling]:
    """A program a token: it needs the whole row for the norm."""
    norm = "rms_norm_" if work.has("add") else ""
    hidden = work.width(f"{norm}w")
    reduce = work.has("all_reduce")
    facts: dict[str, Constant] = {
        "H": hidden,
        "BLOCK_H": up2(hidden),
        "EPS": work.number("rms_norm", "eps"),
    }
    facts |= {"WORLD": work.size("all_reduce", "num_ranks")} if reduce else {}
    options: dict[str, object] = {
        "reduce": reduce,
        "adds": work.has("add"),
        "norm": norm,
        "dtype": TRITON_DTYPES[work.dtype],
    }
    return [
        Tiling("add_norm", facts, (per_rows(1, work.by_seqs),), warps, 1, options)
        for warps in (8, 4)
    ]
