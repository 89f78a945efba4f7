"""Gated attention with rotary embeddings over a paged KV cache.

Letters: T tokens, S sequences, Q query heads, K kv heads, D head_dim.

`q`, `gate` and `y` are [T, Q * D], `k` and `v` [T, K * D]; a draft pass has S rows in place of T. A
page of `kv_cache` is [2, page_size, K, D]: keys, then values, in the dtype of k and v or in FP8. In
FP8 it holds k / k_scale and v / v_scale, rounded; attention multiplies by them.
"""

from __future__ import annotations

from tokenspeed_plan.plans.ops.batch_inputs import expect_page_table
from tokenspeed_plan.plans.ops.op_def import (
    Attrs,
    OpDef,
    Specs,
    batch_rows,
    check_norm_kind,
    expect,
    expect_vectors,
    integer,
    like,
    number,
    query_len,
    require,
    rows,
)
from tokenspeed_plan.plans.types import Dim, DType, TensorSpec


def _head_norm(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    check_norm_kind(attrs)
    expect(specs, "w", integer(attrs, "head_dim"))
    dim = rows(specs, "x")
    y = expect(specs, "x", dim, _heads_width(attrs, "num_heads"))
    return {"y": y}


def _heads_width(attrs: Attrs, heads: str) -> int:
    """Columns of all heads together."""
    return integer(attrs, heads) * integer(attrs, "head_dim")


def _split_gate(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    half = _heads_width(attrs, "num_heads")
    dim = rows(specs, "qg")
    expect(specs, "qg", dim, 2 * half)
    return dict.fromkeys(("q", "gate"), like(specs, "qg", half))


def _rope(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    head_dim = integer(attrs, "head_dim")
    rotary_dim = integer(attrs, "rotary_dim")
    fits = rotary_dim <= head_dim and rotary_dim % 2 == 0
    require(fits, f"rotary_dim {rotary_dim} of head_dim {head_dim}")
    dim = batch_rows(specs, "x")
    expect(specs, "positions", dim, dtype="i32")
    y = expect(specs, "x", dim, _heads_width(attrs, "num_heads"))
    return {"y": y}


def _kv_cache(attrs: Attrs, specs: Specs) -> None:
    constants = ("page_size", "num_kv_heads", "head_dim")
    page = [2, *(integer(attrs, name) for name in constants)]
    found = list(specs["kv_cache"].shape)
    fits = found[1:] == page
    require(fits, f"`kv_cache` is {found}, its pages are {page}")


def _expect_stored(attrs: Attrs, specs: Specs, dtype: DType) -> None:
    """Keys and values are kept in the dtype of the activations, or in FP8 with positive scales."""
    stored = specs["kv_cache"].dtype
    require(stored in (dtype, "fp8"), f"`kv_cache` is {stored} where {dtype} or fp8 is needed")
    for name in ("k_scale", "v_scale"):
        if name in attrs:
            require(stored == "fp8", f"{name} of a `kv_cache` of {stored}")
            require(number(attrs, name) > 0.0, f"{name} {attrs[name]}")


def _kv_write(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    _kv_cache(attrs, specs)
    columns = _heads_width(attrs, "num_kv_heads")
    dim = batch_rows(specs, "k")
    dtype = specs["k"].dtype
    expect(specs, "k", dim, columns)
    expect(specs, "v", dim, columns, dtype=dtype)
    _expect_stored(attrs, specs, dtype)
    expect(specs, "slot_mapping", dim, dtype="i32")
    return {}


def _attention(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    _kv_cache(attrs, specs)
    heads = integer(attrs, "num_heads")
    kv_heads = integer(attrs, "num_kv_heads")
    require(heads % kv_heads == 0, f"{heads} query heads over {kv_heads} kv heads")
    expect_vectors(specs, ("cu_seqlens",), "num_seqs+1", "i32")
    expect_vectors(specs, ("context_lens",), "num_seqs", "i32")
    expect_page_table(specs)
    dim = batch_rows(specs, "q")
    _expect_queries(attrs, dim)
    _expect_stored(attrs, specs, specs["q"].dtype)
    y = expect(specs, "q", dim, _heads_width(attrs, "num_heads"))
    return {"y": y}


def _expect_queries(attrs: Attrs, dim: Dim) -> None:
    """A prefill has many queries of a sequence; a decode step has `query_len`."""
    mode = attrs.get("mode")
    require(mode in ("decode", "prefill"), f"mode {mode!r}")
    queries = query_len(attrs)
    per_token = dim == "num_tokens"
    if mode == "prefill":
        require(per_token, "a prefill has many queries a sequence")
        require(queries == 1, "query_len of a prefill")
    if queries > 1:
        require(per_token, "query_len where each sequence has one query")


def _pair(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    x = specs["x"]
    require(specs["g"] == x, "operands differ")
    return {"y": x}


ATTENTION_OPS: dict[str, OpDef] = {
    "head_norm": OpDef(
        inputs=("x",),
        outputs=("y",),
        infer=_head_norm,
        doc="y = rms_norm(x) of each head",
        weights=("w",),
        attrs=("eps", "num_heads", "head_dim"),
        optional=("plain",),
    ),
    "split_gate": OpDef(
        inputs=("qg",),
        outputs=("q", "gate"),
        infer=_split_gate,
        doc="q, gate = first and second half of each head of qg",
        attrs=("num_heads", "head_dim"),
    ),
    "rope": OpDef(
        inputs=("x", "positions"),
        outputs=("y",),
        infer=_rope,
        doc=(
            "y = x with the first `rotary_dim` of each head rotated, in pairs (i, i + rotary_dim "
            "/ 2)"
        ),
        attrs=("num_heads", "head_dim", "rotary_dim", "theta", "factor", "original_max_positions"),
    ),
    "kv_write": OpDef(
        inputs=("k", "v", "slot_mapping"),
        outputs=(),
        infer=_kv_write,
        doc="kv_cache[slot_mapping] = k, v",
        states=(("kv_cache", "write"),),
        attrs=("num_kv_heads", "head_dim", "page_size"),
        optional=("k_scale", "v_scale"),
    ),
    "attention": OpDef(
        inputs=("q", "page_table", "context_lens", "cu_seqlens"),
        outputs=("y",),
        infer=_attention,
        doc="y = softmax(q k^T / sqrt(D)) v, causal",
        states=(("kv_cache", "read"),),
        attrs=("mode", "num_heads", "num_kv_heads", "head_dim", "page_size"),
        optional=("query_len", "k_scale", "v_scale"),
    ),
    "sigmoid_gate": OpDef(
        inputs=("x", "g"),
        outputs=("y",),
        infer=_pair,
        doc="y = x * sigmoid(g)",
    ),
}
