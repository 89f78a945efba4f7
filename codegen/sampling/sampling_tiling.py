"""The next token, and the inputs of the next step."""

from __future__ import annotations

from tokenspeed_plan.codegen.tiling import (
    TRITON_DTYPES,
    Tiling,
    Work,
    blocks,
    dst_slots,
    fixed,
    per_rows,
    per_seq,
    per_token,
    up2,
)
from tokenspeed_plan.codegen.tuned import Tile
from tokenspeed_plan.plans.ops import ADJUSTMENTS, TOKEN_MASK, mask_words, query_len
from tokenspeed_plan.plans.types import Constant, TensorSpec


def advance(work: Work) -> list[Tiling]:
    """One program: it is a few numbers a sequence."""
    constants: dict[str, Constant] = {
        "PAGE": work.size("advance", "page_size"),
        "PAGES": work.width("page_table"),
        "BLOCK": up2(work.num_seqs),
    }
    constants |= dst_slots(work, "dst_state_slots")
    in_place = bool(work.part("advance").attrs.get("in_place"))
    tiling = Tiling(
        template="advance",
        constants=constants,
        grid=(fixed(1),),
        num_warps=1,
        num_stages=1,
        options={"in_place": in_place},
    )
    return [tiling]


def mask(work: Work) -> list[Tiling]:
    """A program a row of logits and part of the vocabulary."""
    words = mask_words(work.width("logits"))
    return [_rows_tiling(work, {"WORDS": words, "COLUMNS": work.width(TOKEN_MASK)})]


def adjust(work: Work) -> list[Tiling]:
    """A program a row of logits and part of the vocabulary, which looks at all adjustments."""
    return [_rows_tiling(work, {"COLUMNS": work.width(ADJUSTMENTS), "BLOCK_E": 1024})]


def _rows_tiling(work: Work, constants: dict[str, Constant]) -> Tiling:
    """A program that copies a part of a row of logits, with changes."""
    vocab = work.width("logits")
    block = 4096
    if work.interpreted:
        block = up2(vocab)
    constants |= {"VOCAB": vocab, "BLOCK": block}
    if work.query_len > 1:
        constants["QUERY_LEN"] = work.query_len
    return Tiling(
        template=work.kind,
        constants=constants,
        grid=(per_rows(1, work.by_seqs), fixed(blocks(vocab, block))),
        num_warps=8,
        num_stages=1,
    )


def sample(work: Work) -> list[Tiling]:
    """A program a row of logits and part of the vocabulary; the last to end draws the token."""
    block = _block(work.width("logits"))
    tiles = (Tile(1, block, block, num_warps, 1) for num_warps in (16, 32))
    return [_sample_tiling(work, tile) for tile in work.tiles(*tiles)]


def _sample_tiling(work: Work, tile: Tile) -> Tiling:
    """A tile has `n` tokens at a time, and `k` of the vocabulary in all."""
    constants, scratch = best_token(work, "logits", tile.n, tile.k)
    part = work.kernel.parts[0]
    constants["VALID"] = work.size(part.kind, "num_valid_tokens")
    queries = query_len(part.attrs)
    if queries > 1:
        constants["QUERY_LEN"] = queries
    num_parts = int(constants.get("PARTS", 1))
    return Tiling(
        template="sample",
        constants=constants,
        grid=(per_rows(1, work.by_seqs), fixed(num_parts)),
        num_warps=tile.num_warps,
        num_stages=1,
        options={
            "num_parts": num_parts,
            "dtype": _logits_dtype(work),
            "min_p": work.has("sample_min_p"),
        },
        scratch=scratch,
    )


def _logits_dtype(work: Work) -> str:
    return TRITON_DTYPES[work.specs["logits"].dtype]


def _block(vocab: int) -> int:
    return max(up2(vocab) // 32, 256)


def best_token(
    work: Work, logits: str, block: int = 0, part_size: int = 0
) -> tuple[dict[str, Constant], dict[str, TensorSpec]]:
    """A search for the best token of each row of `logits`.

    Args:
        work: the kernel.
        logits: the parameter.
        block: tokens at a time.
        part_size: of the vocabulary, for a program.

    Returns:
        Constants, with `PARTS` where several programs share a row, and the scratch through which
        those exchange their results.
    """
    vocab = work.width(logits)
    if work.interpreted:
        return {"VOCAB": vocab, "BLOCK": min(up2(vocab), 8192)}, {}
    block = block or _block(vocab)
    part_size = part_size or block
    parts = blocks(vocab, part_size)
    constants: dict[str, Constant] = {"VOCAB": vocab, "BLOCK": block}
    if parts == 1:
        return constants, {}
    constants |= {"PARTS": parts, "BLOCK_P": up2(parts), "PART_SIZE": part_size}
    each = per_seq if work.by_seqs else per_token
    scratch = {
        "bests": each(parts),
        "tokens": each(parts, "i32"),
        "counters": each(1, "i32"),
    }
    return constants, scratch
