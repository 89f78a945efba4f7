"""Drafts: what they start from, how many are accepted, and the next verifying step.

Letters: T tokens, S sequences, H hidden, V vocabulary, R query_len, n accepted drafts; s a
sequence, t a token. `x` is [T, H], `logits` [S, V], `drafts` [S, R].
"""

from __future__ import annotations

from tokenspeed_plan.plans.ops.batch_inputs import (
    BATCH_STATE,
    STOP_IDS,
    expect_batch_state,
    expect_page_table,
)
from tokenspeed_plan.plans.ops.op_def import (
    Attrs,
    OpDef,
    Specs,
    expect,
    expect_vectors,
    integer,
    require,
    width,
)
from tokenspeed_plan.plans.types import DType, TensorSpec


def _select_row(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    integer(attrs, "query_len")
    expect(specs, "accepted", "num_seqs", dtype="i32")
    columns = width(specs, "x")
    x = expect(specs, "x", "num_tokens", columns)
    y = x.reshaped(("num_seqs", columns))
    return {"y": y}


def _shift_tokens(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    expect(specs, "cu_seqlens", "num_seqs+1", dtype="i32")
    expect_vectors(specs, ("following", "next_tokens"), "num_seqs", "i32")
    y = expect(specs, "token_ids", "num_tokens", dtype="i32")
    return {"y": y}


def _accept(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    depth = integer(attrs, "query_len") - 1
    require(depth > 0, "there is nothing to accept")
    expect_vectors(specs, ("token_ids", "next_tokens"), "num_tokens", "i32")
    expect_vectors(specs, ("context_lens", "src_state_slots", "max_lens"), "num_seqs", "i32")
    expect(specs, "stop_ids", "num_seqs", STOP_IDS, dtype="i32")
    expect_vectors(specs, ("seed", "rng_offset"), "num_seqs", "i64")
    per_draft: dict[str, DType] = {"forced_accept": "fp32", "accept_counts": "i64"}
    for name, dtype in per_draft.items():
        spec = specs[name]
        is_vector = len(spec.shape) == 1
        fits = is_vector and width(specs, name) > depth
        require(fits, f"`{name}` for depth {depth}")
        require(spec.dtype == dtype, f"`{name}` is {spec.dtype}")
    out = TensorSpec.of(shape=("num_seqs",), dtype="i32")
    return dict.fromkeys(("accepted", "lens", "last_tokens"), out)


def _draft(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    expect(specs, "logits", "num_seqs", width(specs, "logits"))
    shape = specs["earlier"].shape
    known = 1
    if len(shape) == 2:
        known = width(specs, "earlier")
    earlier = expect(specs, "earlier", "num_seqs", *shape[1:], dtype="i32")
    drafts = earlier.reshaped(("num_seqs", known + 1))
    return {"drafts": drafts}


def _draft_place(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    integer(attrs, "page_size")
    integer(attrs, "step")
    lens = expect(specs, "lens", "num_seqs", dtype="i32")
    expect_page_table(specs)
    return dict.fromkeys(("positions", "slot_mapping", "context_lens"), lens)


def _advance_rows(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    integer(attrs, "page_size")
    count = integer(attrs, "query_len")
    require(count > 1, "`advance` is the operator for one query a sequence")
    expect(specs, "accepted", "num_seqs", dtype="i32")
    expect(specs, "drafts", "num_seqs", count, dtype="i32")
    slots = count
    if specs["dst_state_slots"].shape == ("num_seqs",):  # inputs are kept, not states
        slots = 1
    expect_batch_state(specs, slots)
    return {}


SPECULATION_OPS: dict[str, OpDef] = {
    "select_row": OpDef(
        inputs=("x", "accepted"),
        outputs=("y",),
        infer=_select_row,
        doc="y[s] = x[s * R + accepted[s]]",
        attrs=("query_len",),
    ),
    "shift_tokens": OpDef(
        inputs=("token_ids", "following", "next_tokens", "cu_seqlens"),
        outputs=("y",),
        infer=_shift_tokens,
        doc=(
            "y[t] = token_ids[t + 1]; at the end of a sequence y = following, or next_tokens "
            "where following < 0"
        ),
    ),
    # `forced_accept` is zero except in benchmarks that simulate acceptance. Where f =
    # forced_accept[i] is not zero, the draft after query i is accepted if u < f, whatever it is; a
    # negative f is never accepted. u is the number in [0, 1) that `sample` draws for (seed[s],
    # rng_offset[s] + i): the upper bits of SplitMix64 for the state
    # seed + (rng_offset + i + 1) * 0x9E3779B97F4A7C15. Limits and stop ids hold as usual; the
    # tokens are then meaningless.
    "accept": OpDef(
        inputs=(
            "token_ids",
            "next_tokens",
            "context_lens",
            "src_state_slots",
            "max_lens",
            "stop_ids",
            "seed",
            "rng_offset",
            "forced_accept",
        ),
        outputs=("accepted", "lens", "last_tokens"),
        infer=_accept,
        doc=(
            "n = number of leading drafts token_ids[1:] that equal next_tokens, up to the first "
            "of stop_ids and lens <= max_lens; lens = context_lens - R + n + 1; last_tokens = "
            "next_tokens[n]; accept_counts[:n + 1] += 1"
        ),
        states=(("accept_counts", "update"),),
        attrs=("query_len",),
    ),
    "draft_place": OpDef(
        inputs=("lens", "page_table"),
        outputs=("positions", "slot_mapping", "context_lens"),
        infer=_draft_place,
        doc=(
            "positions = lens + step - 1; slot_mapping = their KV slots; context_lens = lens + step"
        ),
        attrs=("page_size", "step"),
    ),
    "draft": OpDef(
        inputs=("logits", "earlier"),
        outputs=("drafts",),
        infer=_draft,
        doc="drafts = [earlier | argmax(logits)]",
    ),
    "advance_rows": OpDef(
        inputs=("accepted", "drafts", "page_table"),
        outputs=(),
        infer=_advance_rows,
        doc=(
            "advance by accepted + 1 tokens: token_ids = drafts; src_state_slots = "
            "dst_state_slots[accepted], or the only one"
        ),
        states=tuple((name, "update") for name in BATCH_STATE),
        attrs=("page_size", "query_len"),
    ),
}
