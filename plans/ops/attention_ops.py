"""Gated attention with rotary embeddings over a paged KV cache."""

from __future__ import annotations

from tokenspeed_plan.plans.ops.op_def import (
    Attrs,
    OpDef,
    Specs,
    batch_rows,
    check_norm_kind,
    expect,
    integer,
    like,
    query_len,
    require,
    rows,
    width,
)
from tokenspeed_plan.plans.types import TensorSpec


def _head_norm(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    check_norm_kind(attrs)
    expect(specs, "w", integer(attrs, "head_dim"))
    expect(specs, "x", rows(specs, "x"), integer(attrs, "num_heads") * integer(attrs, "head_dim"))
    return {"y": specs["x"]}


def _split_gate(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    half = integer(attrs, "num_heads") * integer(attrs, "head_dim")
    expect(specs, "qg", rows(specs, "qg"), 2 * half)
    return {"q": like(specs, "qg", half), "gate": like(specs, "qg", half)}


def _rope(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    head_dim, rotary_dim = integer(attrs, "head_dim"), integer(attrs, "rotary_dim")
    fits = rotary_dim <= head_dim and rotary_dim % 2 == 0
    require(fits, f"rotary_dim {rotary_dim} of head_dim {head_dim}")
    dim = batch_rows(specs, "x")
    expect(specs, "positions", dim, dtype="i32")
    return {"y": expect(specs, "x", dim, integer(attrs, "num_heads") * head_dim)}


def _kv_cache(attrs: Attrs, specs: Specs) -> None:
    heads, head_dim = integer(attrs, "num_kv_heads"), integer(attrs, "head_dim")
    page = (2, integer(attrs, "page_size"), heads, head_dim)
    shape = specs["kv_cache"].shape
    require(shape[1:] == page, f"`kv_cache` is {list(shape)}, its pages are {list(page)}")


def _kv_write(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    _kv_cache(attrs, specs)
    row = integer(attrs, "num_kv_heads") * integer(attrs, "head_dim")
    dim = batch_rows(specs, "k")
    for name in ("k", "v"):
        expect(specs, name, dim, row, dtype=specs["kv_cache"].dtype)
    expect(specs, "slot_mapping", dim, dtype="i32")
    return {}


def _attention(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    _kv_cache(attrs, specs)
    require(attrs.get("mode") in ("decode", "prefill"), f"mode {attrs.get('mode')!r}")
    heads, kv_heads = integer(attrs, "num_heads"), integer(attrs, "num_kv_heads")
    require(heads % kv_heads == 0, f"{heads} query heads over {kv_heads} kv heads")
    expect(specs, "cu_seqlens", "num_seqs+1", dtype="i32")
    expect(specs, "context_lens", "num_seqs", dtype="i32")
    expect(specs, "page_table", "num_seqs", width(specs, "page_table"), dtype="i32")
    dim = batch_rows(specs, "q")
    if attrs["mode"] == "prefill":
        require(dim == "num_tokens", "a prefill has many queries a sequence")
        require(query_len(attrs) == 1, "query_len of a prefill")
    if query_len(attrs) > 1:
        require(dim == "num_tokens", "query_len where each sequence has one query")
    return {"y": expect(specs, "q", dim, heads * integer(attrs, "head_dim"))}


def _pair(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    require(specs["x"] == specs["g"], "operands differ")
    return {"y": specs["x"]}


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
    ),
    "attention": OpDef(
        inputs=("q", "page_table", "context_lens", "cu_seqlens"),
        outputs=("y",),
        infer=_attention,
        doc="y = softmax(q k^T / sqrt(D)) v, causal",
        states=(("kv_cache", "read"),),
        attrs=("mode", "num_heads", "num_kv_heads", "head_dim", "page_size"),
        optional=("query_len",),
    ),
    "sigmoid_gate": OpDef(
        inputs=("x", "g"),
        outputs=("y",),
        infer=_pair,
        doc="y = x * sigmoid(g)",
    ),
}
