"""Drafts: the inputs of the draft layer, its output, and which drafts are accepted.

All of it is small but the vocabulary.
"""

from __future__ import annotations

from tokenspeed_plan.codegen.sampling.sampling_tiling import best_token
from tokenspeed_plan.codegen.tiling import (
    Tiling,
    Work,
    blocks,
    dst_slots,
    fixed,
    id_columns,
    per_rows,
    up2,
)
from tokenspeed_plan.plans.schema import GridDim, Part
from tokenspeed_plan.plans.types import Constant

SEQS = GridDim(per_seq=1)


def _one_program(template: str, constants: dict[str, Constant]) -> list[Tiling]:
    tiling = Tiling(
        template=template, constants=constants, grid=(fixed(1),), num_warps=1, num_stages=1
    )
    return [tiling]


def norm_concat(work: Work) -> list[Tiling]:
    """A program a token and half of the result."""
    hidden = work.width("concat_y") // 2
    constants: dict[str, Constant] = {"H": hidden, "BLOCK_H": up2(hidden)}
    embedded: tuple[str, ...] = ()
    columns = 0
    if work.has("embed"):
        embedded = work.part("embed").outputs
        columns = id_columns(work, "embed_token_ids")
        constants["VOCAB"] = work.width("embed_table", 0)
    norms = {part.outputs[0]: part for part in work.kernel.parts if part.kind == "rms_norm"}
    halves = [_half(norms[name], embedded) for name in work.part("concat").operands]
    return [
        Tiling(
            template="norm_concat",
            constants=constants,
            grid=(per_rows(1, work.by_seqs), fixed(2)),
            num_warps=num_warps,
            num_stages=1,
            options={"halves": halves, "columns": columns},
        )
        for num_warps in (8, 4)
    ]


def _half(norm: Part, embedded: tuple[str, ...]) -> dict[str, object]:
    """What a half of the result is: the norm of `x`, or of an embedding where `x` is empty."""
    x, weight = norm.operands
    if x in embedded:
        x = ""
    return {"x": x, "w": weight, "eps": norm.attrs["eps"]}


def take_rows(work: Work) -> list[Tiling]:
    """A program a sequence and block of columns, for all tensors at once."""
    kind = work.kernel.parts[0].kind
    moved, widest = [], 0
    for part in work.kernel.parts:
        size = work.width(part.outputs[0])
        moved.append((part.operands[0], part.outputs[0], size))
        widest = max(widest, size)
    block = min(up2(widest), 1024)
    constants: dict[str, Constant] = {"BLOCK_N": block}
    if kind == "select_row":
        constants["QUERY_LEN"] = work.size(kind, "query_len")
    tiling = Tiling(
        template="take_rows",
        constants=constants,
        grid=(SEQS, fixed(blocks(widest, block))),
        num_warps=4,
        num_stages=1,
        options={"moved": moved, "which": f"{kind}_"},
    )
    return [tiling]


def accept(work: Work) -> list[Tiling]:
    """One program: it is a few numbers a sequence."""
    queries = work.size("accept", "query_len")
    constants: dict[str, Constant] = {
        "QUERY_LEN": queries,
        "BLOCK_R": up2(queries),
        "STOP_IDS": work.width("stop_ids"),
        "BLOCK": up2(work.num_seqs),
    }
    return _one_program("accept", constants)


def draft(work: Work) -> list[Tiling]:
    """A program a sequence and part of the vocabulary; the last to end writes the draft."""
    place = work.has("draft_place")
    prefix = "draft_" if place else ""
    constants, scratch = best_token(work, f"{prefix}logits")
    constants["EARLIER"] = work.width(f"{prefix}drafts") - 1
    if place:
        constants |= {
            "PAGE": work.size("draft_place", "page_size"),
            "PAGES": work.width("draft_place_page_table"),
            "STEP": work.size("draft_place", "step"),
        }
    num_parts = int(constants.get("PARTS", 1))
    return [
        Tiling(
            template="draft",
            constants=constants,
            grid=(SEQS, fixed(num_parts)),
            num_warps=num_warps,
            num_stages=1,
            options={"num_parts": num_parts, "place": place, "prefix": prefix},
            scratch=scratch,
        )
        for num_warps in (16, 32)
    ]


def shift_tokens(work: Work) -> list[Tiling]:
    """A program a sequence and block of its tokens."""
    tiling = Tiling(
        template="shift_tokens",
        constants={"BLOCK": 1024},
        grid=(per_rows(1024), SEQS),
        num_warps=4,
        num_stages=1,
    )
    return [tiling]


def commit_state_len(work: Work) -> list[Tiling]:
    """One program: it is a number a sequence."""
    constants: dict[str, Constant] = {"QUERY_LEN": work.query_len, "BLOCK": up2(work.num_seqs)}
    return _one_program("commit_state_len", constants)


def advance_rows(work: Work) -> list[Tiling]:
    """One program: it is a few numbers a token."""
    constants: dict[str, Constant] = {
        "PAGE": work.size("advance_rows", "page_size"),
        "PAGES": work.width("page_table"),
        "QUERY_LEN": work.size("advance_rows", "query_len"),
        "BLOCK": up2(work.num_seqs),
    }
    constants |= dst_slots(work, "dst_state_slots")
    return _one_program("advance_rows", constants)
