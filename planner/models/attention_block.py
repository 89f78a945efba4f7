"""Full attention over pages: q/k norm, rotary embedding, and a gate where the family has one.

Shapes: T tokens, Q query heads, K kv heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenspeed_plan.planner.layout import Split
from tokenspeed_plan.planner.models.builder import GraphBuilder, Splits
from tokenspeed_plan.planner.models.common_blocks import BATCH_PLACES, TokenPlaces, norm_attrs
from tokenspeed_plan.plans.types import Attr


@dataclass(frozen=True, slots=True)
class Queries:
    """Names of queries [T, Q * D], and of their gates where attention is gated."""

    q: str
    gate: str | None


def attention(graph: GraphBuilder, name: str, source: str, x: str) -> str:
    """Attention of the batch's tokens to all that is in the cache, their own keys included."""
    made = queries(graph, name, source, x, BATCH_PLACES)
    return attend(graph, name, source, made, BATCH_PLACES)


def queries(graph: GraphBuilder, name: str, source: str, x: str, places: TokenPlaces) -> Queries:
    """Queries and gates of the tokens; their keys and values are written."""
    config = graph.config.attention
    source = f"{source}self_attn."
    heads = query_heads(graph)
    q_name = f"{name}.q_proj"
    q_size = heads.units * config.head_dim
    if config.gated:
        q_name = f"{name}.qg"
        q_size *= 2
    blocks: dict[str, tuple[int, Splits]] = {f"{source}q_proj.weight": (q_size, {0: heads})}
    blocks |= _kv_blocks(graph, source)
    weight = graph.matrix(f"{name}.qkv.weight", blocks, graph.config.hidden_size)
    outs = [(size, splits[0]) for size, splits in blocks.values()]
    out_names = (q_name, f"{name}.k", f"{name}.v")
    q, k, v = graph.linear(f"{name}.qkv", x, weight, outs, out_names)
    gate = None
    if config.gated:
        q, gate = _split_gate(graph, name, q, heads)
    q = _norm_rope(graph, f"{name}.q", f"{source}q_norm.weight", q, heads, places)
    _write_keys(graph, name, source, k, v, places)
    return Queries(q, gate)


def attend(graph: GraphBuilder, name: str, source: str, made: Queries, places: TokenPlaces) -> str:
    """Attention of queries to all that is in the cache, and the output projection."""
    heads = query_heads(graph)
    o = _attention(graph, name, source, made.q, places)
    if made.gate is not None:
        (o,) = graph.op(f"{name}.gated", "sigmoid_gate", (o, made.gate), out_splits=(heads,))
    hidden = graph.config.hidden_size
    q_size = heads.units * graph.config.attention.head_dim
    weight = graph.row_parallel(
        f"{name}.o.weight",
        f"{source}self_attn.o_proj.weight",
        (hidden, q_size),
        heads,
    )
    (y,) = graph.linear(f"{name}.o", o, weight, ((hidden, None),), partial=True)
    return y


def write_keys_only(graph: GraphBuilder, name: str, source: str, x: str) -> None:
    """Write keys and values of tokens that have no query."""
    source = f"{source}self_attn."
    blocks = _kv_blocks(graph, source)
    weight = graph.matrix(f"{name}.kv.weight", blocks, graph.config.hidden_size)
    outs = [(size, splits[0]) for size, splits in blocks.values()]
    out_names = (f"{name}.k", f"{name}.v")
    k, v = graph.linear(f"{name}.kv", x, weight, outs, out_names)
    _write_keys(graph, name, source, k, v, BATCH_PLACES)


def query_heads(graph: GraphBuilder) -> Split:
    """How ranks share query heads."""
    return Split("attention", graph.config.attention.num_qo_heads)


def _kv_heads(graph: GraphBuilder) -> Split:
    return Split("kv", graph.config.attention.num_kv_heads)


def _kv_blocks(graph: GraphBuilder, source: str) -> dict[str, tuple[int, Splits]]:
    kv_heads = _kv_heads(graph)
    rows = kv_heads.units * graph.config.attention.head_dim
    return {f"{source}{key}_proj.weight": (rows, {0: kv_heads}) for key in "kv"}


def _write_keys(
    graph: GraphBuilder, name: str, source: str, k: str, v: str, places: TokenPlaces
) -> None:
    kv_heads = _kv_heads(graph)
    k = _norm_rope(graph, f"{name}.k", f"{source}k_norm.weight", k, kv_heads, places)
    graph.op(
        f"{name}.kv_write",
        "kv_write",
        (k, v, places.slot_mapping),
        states=(_kv_cache(graph, name),),
        attrs=_kv_attrs(graph, source),
        attr_splits={"num_kv_heads": kv_heads},
    )


def _attention(graph: GraphBuilder, name: str, source: str, q: str, places: TokenPlaces) -> str:
    heads = query_heads(graph)
    attrs = _kv_attrs(graph, f"{source}self_attn.") | {"mode": "decode", "num_heads": heads.units}
    if graph.tensors[q].spec.shape[0] == "num_tokens":
        attrs |= graph.query_attrs
        if graph.phase == "prefill":
            attrs["mode"] = "prefill"
    return graph.op(
        f"{name}.attention",
        "attention",
        (q, "page_table", places.context_lens, "cu_seqlens"),
        states=(_kv_cache(graph, name),),
        attrs=attrs,
        attr_splits={"num_heads": heads, "num_kv_heads": _kv_heads(graph)},
        out_splits=(heads,),
    )[0]


def _kv_attrs(graph: GraphBuilder, source: str) -> dict[str, Attr]:
    """Constants of a cache; scales other than 1 make kernels of the layer's own."""
    config = graph.config.attention
    attrs: dict[str, Attr] = {
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "page_size": graph.context.limits.page_size,
    }
    if graph.context.kv_dtype == "fp8":
        scales = graph.context.key_scales(source)
        for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
            if scale != 1.0:
                attrs[name] = scale
    return attrs


def _kv_cache(graph: GraphBuilder, name: str) -> str:
    """Pages of keys and values [num_pages + 1, 2, page_size, K, D]; the last takes padding."""
    config = graph.config.attention
    limits = graph.context.limits
    shape = (
        limits.num_pages + 1,
        2,
        limits.page_size,
        config.num_kv_heads,
        config.head_dim,
    )
    splits = ((3, _kv_heads(graph)),)
    dtype = graph.context.kv_dtype or graph.context.dtype
    return graph.tensor(f"{name}.kv_cache", shape, dtype, "kv_cache", splits)


def _split_gate(graph: GraphBuilder, name: str, qg: str, heads: Split) -> tuple[str, ...]:
    return graph.op(
        f"{name}.split_gate",
        "split_gate",
        (qg,),
        out_splits=(heads, heads),
        attrs={"num_heads": heads.units, "head_dim": graph.config.attention.head_dim},
        attr_splits={"num_heads": heads},
    )


def _norm_rope(
    graph: GraphBuilder, name: str, source: str, x: str, heads: Split, places: TokenPlaces
) -> str:
    """RMSNorm of each head, then the rotary embedding of its first `rotary_dim` channels."""
    config = graph.config.attention
    attrs: dict[str, Attr] = {"num_heads": heads.units, "head_dim": config.head_dim}
    weight = graph.vector(f"{name}_norm.weight", source, config.head_dim)
    normed = graph.op(
        f"{name}_normed",
        "head_norm",
        (x,),
        (weight,),
        out_splits=(heads,),
        attrs=attrs | norm_attrs(graph),
        attr_splits={"num_heads": heads},
    )[0]
    rope: dict[str, Attr] = {
        "rotary_dim": config.rotary_dim,
        "theta": config.rope_theta,
        "factor": config.rope_factor,
        "original_max_positions": config.rope_original_max_positions,
    }
    return graph.op(
        f"{name}_roped",
        "rope",
        (normed, places.positions),
        out_splits=(heads,),
        attrs=attrs | rope,
        attr_splits={"num_heads": heads},
    )[0]
