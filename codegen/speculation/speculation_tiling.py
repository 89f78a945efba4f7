"""Drafts: into the layer that makes them, out of it, accepted or not. All of it is small; the vocabulary is not."""

from __future__ import annotations

from tokenspeed_plan.codegen.sampling.sampling_tiling import best_token, id_columns
from tokenspeed_plan.codegen.tiling import Tiling, Work, blocks, fixed, per_rows, rows_table, up2
from tokenspeed_plan.plans.schema import GridDim, Part
from tokenspeed_plan.plans.types import Constant


def norm_concat(work: Work) -> list[Tiling]:
    """A program a row and half of what comes out."""
    hidden = work.width("concat_y") // 2
    facts: dict[str, Constant] = {"H": hidden, "BLOCK_H": up2(hidden)}
    embedded = work.part("embed").outputs if work.has("embed") else ()
    norms = {part.outputs[0]: part for part in work.kernel.parts if part.kind == "rms_norm"}
    halves = [_half(norms[name], embedded) for name in work.part("concat").operands]
    facts |= {"ROWS": work.width("embed_table", 0)} if embedded else {}
    columns = id_columns(work, "embed_token_ids") if embedded else 0
    options: dict[str, object] = {"halves": halves, "columns": columns}
    grid = (per_rows(1, work.by_seqs), fixed(2))
    return [Tiling("norm_concat", facts, grid, warps, 1, options) for warps in (8, 4)]


def _half(norm: Part, embedded: tuple[str, ...]) -> dict[str, object]:
    x, weight = norm.operands
    return {"x": "" if x in embedded else x, "w": weight, "eps": norm.attrs["eps"]}


def take_rows(work: Work) -> list[Tiling]:
    """A program a sequence and block of columns, of all that is taken."""
    kind = work.kernel.parts[0].kind
    moved = [
        (part.operands[0], part.outputs[0], work.width(part.outputs[0]))
        for part in work.kernel.parts
    ]
    block = min(up2(max(size for *_, size in moved)), 1024)
    facts: dict[str, Constant] = {"BLOCK_N": block}
    facts |= {"ROWS": work.size(kind, "query_len")} if kind == "select_row" else {}
    grid = (GridDim(per_seq=1), fixed(blocks(max(size for *_, size in moved), block)))
    return [Tiling("take_rows", facts, grid, 4, 1, {"moved": moved, "which": f"{kind}_"})]


def accept(work: Work) -> list[Tiling]:
    """One program: it is a few numbers a sequence."""
    rows = work.size("accept", "query_len")
    facts: dict[str, Constant] = {
        "ROWS": rows,
        "BLOCK_R": up2(rows),
        "STOPS": work.width("stop_ids"),
        "BLOCK": up2(work.num_seqs),
    }
    return [Tiling("accept", facts, (fixed(1),), 1, 1)]


def draft(work: Work) -> list[Tiling]:
    """A program a sequence and part of the vocabulary; the last to end writes the draft down."""
    place, own = work.has("draft_place"), "draft_" if work.has("draft_place") else ""
    facts, parts, scratch = best_token(work, f"{own}logits")
    facts |= {"KNOWN": work.width(f"{own}drafts") - 1}
    if place:
        facts |= {
            "PAGE": work.size("draft_place", "page_size"),
            "PAGES": work.width("draft_place_page_table"),
        }
        facts |= {"STEP": work.size("draft_place", "step")}
    grid = (GridDim(per_seq=1), fixed(parts))
    options: dict[str, object] = {"shares": parts, "place": place, "own": own}
    return [Tiling("draft", facts, grid, warps, 1, options, scratch) for warps in (16, 32)]


def shift_tokens(work: Work) -> list[Tiling]:
    """A program a sequence and block of its tokens."""
    return [Tiling("shift_tokens", {"BLOCK": 1024}, (per_rows(1024), GridDim(per_seq=1)), 4, 1)]


def commit_state_len(work: Work) -> list[Tiling]:
    """One program: it is a number a sequence."""
    facts: dict[str, Constant] = {"ROWS": work.query_len, "BLOCK": up2(work.num_seqs)}
    return [Tiling("commit_state_len", facts, (fixed(1),), 1, 1)]


def advance_rows(work: Work) -> list[Tiling]:
    """One program: it is a few numbers a row."""
    facts: dict[str, Constant] = {
        "PAGE": work.size("advance_rows", "page_size"),
        "PAGES": work.width("page_table"),
        "ROWS": work.size("advance_rows", "query_len"),
        "BLOCK": up2(work.num_seqs),
    }
    facts |= rows_table(work, "dst_state_slots")
    return [Tiling("advance_rows", facts, (fixed(1),), 1, 1)]
