"""The last token of each sequence, its sample, and the next decode step.

Letters: T tokens, S sequences, H hidden, V vocabulary. `x` is [T, H], `logits` are [S, V], or
[T, V] where a step verifies drafts.
"""

from __future__ import annotations

from tokenspeed_plan.plans.ops.batch_inputs import (
    ADJUSTMENTS,
    BATCH_STATE,
    IS_MASKED,
    MIN_P,
    PENALTIES,
    SAMPLING_INPUTS,
    TOKEN_MASK,
    expect_batch_state,
    mask_words,
)
from tokenspeed_plan.plans.ops.op_def import (
    Attrs,
    OpDef,
    Specs,
    expect,
    integer,
    query_len,
    require,
    width,
)
from tokenspeed_plan.plans.types import Dim, TensorSpec


def _last_token(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    expect(specs, "cu_seqlens", "num_seqs+1", dtype="i32")
    columns = width(specs, "x")
    x = expect(specs, "x", "num_tokens", columns)
    y = x.reshaped(("num_seqs", columns))
    return {"y": y}


def _sample(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    vocabulary = width(specs, "logits")
    fits = integer(attrs, "num_valid_tokens") <= vocabulary
    require(fits, "num_valid_tokens over the vocabulary")
    dim: Dim = "num_seqs"
    if query_len(attrs) > 1:
        dim = "num_tokens"
    expect(specs, "logits", dim, vocabulary)
    for name, dtype in SAMPLING_INPUTS.items():
        expect(specs, name, "num_seqs", dtype=dtype)
    return {"next_tokens": TensorSpec.of(shape=(dim,), dtype="i32")}


def _sample_min_p(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    expect(specs, MIN_P, "num_seqs", dtype="fp32")
    return _sample(attrs, specs)


def _adjust(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    dim: Dim = "num_seqs"
    if query_len(attrs) > 1:
        dim = "num_tokens"
    logits = expect(specs, "logits", dim, width(specs, "logits"))
    expect(specs, "token_ids", "num_tokens", dtype="i32")
    for name, dtype in PENALTIES.items():
        expect(specs, name, "num_seqs", dtype=dtype)
    columns = width(specs, ADJUSTMENTS)
    expect(specs, ADJUSTMENTS, "num_seqs", columns, dtype="i32")
    require(columns % 3 == 1, f"`{ADJUSTMENTS}` has {columns} words, no number and triples")
    return {"y": logits}


def _mask(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    """The mask has room for every query of a sequence; one with fewer reads the first words."""
    vocabulary = width(specs, "logits")
    queries = query_len(attrs)
    dim: Dim = "num_seqs"
    if queries > 1:
        dim = "num_tokens"
    logits = expect(specs, "logits", dim, vocabulary)
    expect(specs, IS_MASKED, "num_seqs", dtype="i32")
    columns = width(specs, TOKEN_MASK)
    expect(specs, TOKEN_MASK, "num_seqs", columns, dtype="i32")
    words = mask_words(vocabulary)
    fits = columns % words == 0 and columns >= queries * words
    require(fits, f"`{TOKEN_MASK}` has {columns} words for {queries} queries of {words}")
    return {"y": logits}


def _advance(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    integer(attrs, "page_size")
    expect(specs, "next_tokens", "num_seqs", dtype="i32")
    expect_batch_state(specs, 1)
    return {}


SAMPLING_OPS: dict[str, OpDef] = {
    "last_token": OpDef(
        inputs=("x", "cu_seqlens"),
        outputs=("y",),
        infer=_last_token,
        doc="y[s] = x[cu_seqlens[s + 1] - 1]",
    ),
    # For each entry of a sequence, whose count c has the drafts before the query too: l += bias;
    # if prompt or answer has the token, l = l / r where l > 0, else l r; then l -= f c + p [c > 0].
    "adjust": OpDef(
        inputs=("logits", "token_ids", *PENALTIES, ADJUSTMENTS),
        outputs=("y",),
        infer=_adjust,
        doc="y = logits, changed by biases, and by penalties of tokens that were there before",
        optional=("query_len",),
    ),
    "sample_min_p": OpDef(
        inputs=("logits", *SAMPLING_INPUTS, MIN_P),
        outputs=("next_tokens",),
        infer=_sample_min_p,
        doc="`sample` without tokens that are less likely than min_p times the most likely one",
        attrs=("num_valid_tokens",),
        optional=("query_len",),
    ),
    # An operator of its own: `sample` reads its row up to thirty times, and the logits stay as they
    # are for logprobs. Bit v % 32 of word v // 32 stands for token v.
    "mask": OpDef(
        inputs=("logits", IS_MASKED, TOKEN_MASK),
        outputs=("y",),
        infer=_mask,
        doc="y = logits, and -inf for the tokens that a masked sequence may not go on with",
        optional=("query_len",),
    ),
    # Query i of a sequence is token `rng_offset + i`, and is drawn as it would be alone.
    "sample": OpDef(
        inputs=("logits", *SAMPLING_INPUTS),
        outputs=("next_tokens",),
        infer=_sample,
        doc="next_tokens = argmax(logits), or a sample after top-k and top-p",
        attrs=("num_valid_tokens",),
        optional=("query_len",),
    ),
    "advance": OpDef(
        inputs=("next_tokens", "page_table"),
        outputs=(),
        infer=_advance,
        doc="the inputs of the next decode step, in place; padding (src_state_slots = 0) stays",
        states=tuple((name, "update") for name in BATCH_STATE),
        attrs=("page_size",),
        optional=("in_place",),
    ),
}
