"""What a batch brings: metadata of its sequences, which operators share.

Letters: T tokens, S sequences. `token_ids`, `positions` and `slot_mapping` are [T], `cu_seqlens` is
[S + 1], `page_table` is [S, pages], `dst_state_slots` is [S] or [S, slots], `token_mask` is
[S, queries * words], `adjustments` is [S, 1 + 3 * entries]; the others are [S].
"""

from __future__ import annotations

from collections.abc import Mapping

from tokenspeed_plan.plans.ops.op_def import Specs, expect, expect_vectors, require, width
from tokenspeed_plan.plans.types import DType

STOP_IDS = 8  # tokens a sequence that `accept` stops at; other ends are found on the host
BATCH_STATE = (
    "token_ids",
    "positions",
    "slot_mapping",
    "context_lens",
    "src_state_slots",
    "dst_state_slots",
    "rng_offset",
)
SEQ_METADATA = ("cu_seqlens", "src_state_slots", "dst_state_slots")
SAMPLING_INPUTS: dict[str, DType] = {
    "temperature": "fp32",
    "top_p": "fp32",
    "top_k": "i32",
    "seed": "i64",
    "rng_offset": "i64",
}
# Of plans that take grammars: whether a sequence has one, and what its next tokens may be.
IS_MASKED, TOKEN_MASK = "is_masked", "token_mask"
MASK_WORD_BITS = 32
# Of plans that take penalties: whether a sequence has any, which tokens they change, and how.
IS_ADJUSTED, ADJUSTMENTS = "is_adjusted", "adjustments"
PENALTIES: dict[str, DType] = {
    IS_ADJUSTED: "i32",
    "presence_penalty": "fp32",
    "frequency_penalty": "fp32",
    "repetition_penalty": "fp32",
}
# They are large, and made of the tokens of the step before.
LATE_INPUTS = (TOKEN_MASK, ADJUSTMENTS)
MIN_P = "min_p"
MAX_BIASED = 1000  # tokens that a request gives a bias
_MORE_ENTRIES = 1024  # than a sequence has tokens: these, and drafts
_ACCEPT_INPUTS = (
    "max_lens",
    "stop_ids",
    "following",
    "forced_accept",
    "accept_counts",
    "state_lens",
)

# Operands of these roles are the io buffers of the same name. Many have one shape, and only the
# name tells them apart.
BATCH_INPUTS = frozenset(
    (
        *BATCH_STATE,
        *SAMPLING_INPUTS,
        "page_table",
        "cu_seqlens",
        *_ACCEPT_INPUTS,
        IS_MASKED,
        TOKEN_MASK,
        *PENALTIES,
        ADJUSTMENTS,
        MIN_P,
    )
)
# In a draft pass an earlier operator can make the operand of a role: role -> (operator, output).
DRAFT_INPUTS: Mapping[str, frozenset[tuple[str, str]]] = {
    "token_ids": frozenset(
        {
            ("shift_tokens", "y"),
            ("sample", "next_tokens"),
            ("sample_min_p", "next_tokens"),
            ("draft", "drafts"),
        }
    ),
    "positions": frozenset({("draft_place", "positions")}),
    "slot_mapping": frozenset({("draft_place", "slot_mapping")}),
    "context_lens": frozenset({("draft_place", "context_lens"), ("accept", "lens")}),
}


def mask_words(vocab_size: int) -> int:
    """Words of the mask of one query: a bit for each token, the lowest bit first."""
    return -(-vocab_size // MASK_WORD_BITS)


def adjustment_words(vocab_size: int, max_seq_len: int) -> int:
    """Words of the adjustments of a sequence: their number, then three of each.

    Those are the token, twice its count in the answer plus one if the prompt has it, and the bits
    of its bias in fp32. A token has one entry at most.
    """
    return 1 + 3 * min(vocab_size, max_seq_len + _MORE_ENTRIES)


def expect_seq_metadata(specs: Specs) -> None:
    """Where each sequence begins, and the state slots that it reads and writes.

    Raises:
        ShapeError: one has another shape.
    """
    expect(specs, "cu_seqlens", "num_seqs+1", dtype="i32")
    expect(specs, "src_state_slots", "num_seqs", dtype="i32")
    expect_dst_state_slots(specs, 1)


def expect_page_table(specs: Specs) -> None:
    """The pages of each sequence.

    Raises:
        ShapeError: it has another shape.
    """
    num_pages = width(specs, "page_table")
    expect(specs, "page_table", "num_seqs", num_pages, dtype="i32")


def expect_dst_state_slots(specs: Specs, needed: int) -> None:
    """One slot a sequence, or a matrix with a slot for each token that a decode step can verify.

    Raises:
        ShapeError: it has fewer columns than `needed`.
    """
    shape = specs["dst_state_slots"].shape
    columns = shape[1:]
    if not columns:
        fits = needed == 1
    else:
        slots = width(specs, "dst_state_slots")
        fits = len(columns) == 1 and slots >= max(needed, 2)
    require(fits, f"`dst_state_slots` is {list(shape)} for {needed} state slots a sequence")
    expect(specs, "dst_state_slots", "num_seqs", *columns, dtype="i32")


def expect_batch_state(specs: Specs, needed: int) -> None:
    """The inputs that a decode step advances, with `needed` state slots a sequence to write.

    Raises:
        ShapeError: one has another shape.
    """
    expect_page_table(specs)
    expect_vectors(specs, ("token_ids", "positions", "slot_mapping"), "num_tokens", "i32")
    expect_vectors(specs, ("context_lens", "src_state_slots"), "num_seqs", "i32")
    expect(specs, "rng_offset", "num_seqs", dtype="i64")
    expect_dst_state_slots(specs, needed)
