"""The ends of a program: tokens in, tokens out; and sums over ranks."""

from __future__ import annotations

from tokenspeed_plan.planner.tiling.work import TRITON_DTYPES, Tiling, Work, blocks, fixed, per_rows, up2
from tokenspeed_plan.plans.schema import GridDim
from tokenspeed_plan.plans.types import Attr

INDEX_BITS = 20  # of a key: vocabularies up to a million


def embed(work: Work) -> list[Tiling]:
    """A program a token and block of columns."""
    rows, hidden = work.width("table", 0), work.width("table")
    block = min(up2(hidden), 4096)
    facts: dict[str, Attr] = {"ROWS": rows, "H": hidden, "BLOCK_N": block}
    return [Tiling("embed", facts, (per_rows(1), fixed(blocks(hidden, block))), 4, 1)]


def sample(work: Work) -> list[Tiling]:
    """A program a sequence."""
    vocab, valid = work.width("logits"), work.size("sample", "num_valid_tokens")
    facts: dict[str, Attr] = {
        "VOCAB": vocab, "VALID": valid, "BLOCK": min(up2(vocab), 8192), "INDEX_BITS": INDEX_BITS,
    }  # fmt: skip
    return [Tiling("sample", facts, (GridDim(per_seq=1),), warps, 1) for warps in (16, 32)]


def add_norm(work: Work) -> list[Tiling]:
    """A program a token: it needs the whole row for the norm."""
    hidden = work.width("rms_norm_w")
    reduce = work.has("all_reduce")
    facts: dict[str, Attr] = {"H": hidden, "BLOCK_H": up2(hidden), "EPS": work.part("rms_norm").attrs["eps"]}
    facts |= {"WORLD": work.size("all_reduce", "num_ranks")} if reduce else {}
    options: dict[str, object] = {"reduce": reduce, "dtype": TRITON_DTYPES[work.dtype]}
    return [Tiling("add_norm", facts, (per_rows(1),), warps, 1, options) for warps in (8, 4)]
