"""The gated delta rule: a convolution and a recurrence, in steps or in chunks."""

from __future__ import annotations

from tokenspeed_plan.plans.ops.batch_inputs import (
    SEQ_METADATA,
    expect_dst_state_slots,
    expect_seq_metadata,
)
from tokenspeed_plan.plans.ops.op_def import (
    Attrs,
    OpDef,
    Specs,
    dtype_attr,
    expect,
    integer,
    query_len,
    require,
    rows,
    wide,
    width,
)
from tokenspeed_plan.plans.types import Dim, DType, TensorSpec

DELTA_CHUNK = 64  # tokens of a chunk of the delta rule
L2_EPS = 1e-6  # of the norm of its queries and keys
RECOMPUTED = "recomputed"  # the mode of a step that finds its state where `recompute_state` left it


def _expect_mode(attrs: Attrs, specs: Specs, decode: str, prefill: str) -> None:
    """The mode of an operator with recurrent state.

    In mode `decode` each query writes a state, in mode `prefill` the last token of each sequence
    does. In mode `RECOMPUTED` a decode step reads the state that `recompute_state` left in
    `dst_state_slots`, and writes none.
    """
    mode, queries = attrs.get("mode"), query_len(attrs)
    require(mode in (decode, prefill, RECOMPUTED), f"mode {mode!r}")
    if mode == prefill:
        require(queries == 1, f"query_len where the mode is {prefill}")
    if mode == RECOMPUTED:
        queries = 1
    expect_dst_state_slots(specs, queries)


def _conv(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    expect_seq_metadata(specs)
    _expect_mode(attrs, specs, "update", "varlen")
    channels, taps = width(specs, "x"), integer(attrs, "kernel_size")
    expect(specs, "w", channels, 1, taps)
    _expect_conv_state(specs, taps, channels)
    return {"y": expect(specs, "x", "num_tokens", channels)}


def _expect_conv_state(specs: Specs, taps: int, channels: int) -> None:
    """The inputs before the next token, all taps but one."""
    shape = specs["conv_state"].shape
    require(shape[1:] == (taps - 1, channels), f"`conv_state` is {list(shape)}")


def _recompute_state(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    heads, taps = integer(attrs, "num_v_heads"), integer(attrs, "kernel_size")
    key = integer(attrs, "num_k_heads") * integer(attrs, "key_dim")
    channels = 2 * key + heads * integer(attrs, "value_dim")
    x = expect(specs, "x", "num_tokens", channels)
    for name in ("b", "a"):
        expect(specs, name, "num_tokens", heads, dtype=x.dtype)
    for name in ("context_lens", "state_lens", "src_state_slots", "dst_state_slots"):
        expect(specs, name, "num_seqs", dtype="i32")
    expect(specs, "w", channels, 1, taps)
    expect(specs, "a_log", heads)
    expect(specs, "dt_bias", heads)
    _expect_conv_state(specs, taps, channels)
    _ssm_state(attrs, specs, wide(x.dtype))
    kept, queries = specs["kept_inputs"].shape[1:2], query_len(attrs)
    require(kept >= (queries,), f"{list(kept)} inputs are kept of {queries} queries")
    _expect_kept(specs, "kept_inputs", (*kept, channels), x.dtype)
    _expect_kept(specs, "kept_gates", (2, *kept, heads), x.dtype)
    return {}


def _expect_kept(specs: Specs, name: str, shape: tuple[Dim, ...], dtype: DType) -> None:
    """What is kept in each state slot; b and a of `kept_gates` come one after the other."""
    spec = specs[name]
    require(spec.shape[1:] == shape, f"`{name}` is {list(spec.shape)}")
    require(spec.dtype == dtype, f"`{name}` is {spec.dtype}")


def _commit_state_len(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    for name in ("context_lens", "state_lens"):
        expect(specs, name, "num_seqs", dtype="i32")
    query_len(attrs)
    return {}


def _qk_l2_norm(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    key = integer(attrs, "num_k_heads") * integer(attrs, "key_dim")
    value = integer(attrs, "num_v_heads") * integer(attrs, "value_dim")
    x = expect(specs, "x", "num_tokens", 2 * key + value)
    q = TensorSpec.of(shape=("num_tokens", key), dtype=x.dtype)
    v = TensorSpec.of(shape=("num_tokens", value), dtype=x.dtype)
    return {"q": q, "k": q, "v": v}


def _delta_gates(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    heads = width(specs, "b")
    require(specs["a"] == specs["b"], "`a` and `b` differ")
    expect(specs, "a_log", heads)
    expect(specs, "dt_bias", heads)
    out = TensorSpec.of(shape=("num_tokens", heads), dtype=wide(specs["b"].dtype))
    return {"beta": out, "log_decay": out}


def _delta_rule(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    expect_seq_metadata(specs)
    _expect_mode(attrs, specs, "recurrent", "chunked")
    k_heads, v_heads = integer(attrs, "num_k_heads"), integer(attrs, "num_v_heads")
    key_dim, value_dim = integer(attrs, "key_dim"), integer(attrs, "value_dim")
    require(v_heads % k_heads == 0, f"{v_heads} value heads over {k_heads} key heads")
    acc = wide(specs["v"].dtype)
    for name in ("q", "k"):
        expect(specs, name, "num_tokens", k_heads * key_dim, dtype=specs["v"].dtype)
    for name in ("beta", "log_decay"):
        expect(specs, name, "num_tokens", v_heads, dtype=acc)
    _ssm_state(attrs, specs, acc)
    return {"y": expect(specs, "v", "num_tokens", v_heads * value_dim)}


def _ssm_state(attrs: Attrs, specs: Specs, acc: DType) -> None:
    state = specs["ssm_state"]
    wanted = tuple(integer(attrs, name) for name in ("num_v_heads", "key_dim", "value_dim"))
    require(state.shape[1:] == wanted, f"`ssm_state` is {list(state.shape)}")
    require(state.dtype == acc, f"`ssm_state` is {state.dtype} where {acc} is needed")


def _delta_chunk(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    k_heads, v_heads = integer(attrs, "num_k_heads"), integer(attrs, "num_v_heads")
    key_dim, value_dim = integer(attrs, "key_dim"), integer(attrs, "value_dim")
    require(v_heads % k_heads == 0, f"{v_heads} value heads over {k_heads} key heads")
    acc = expect(specs, "beta", "num_tokens", v_heads).dtype
    expect(specs, "log_decay", "num_tokens", v_heads, dtype=acc)
    dtype = expect(specs, "v", "num_tokens", v_heads * value_dim).dtype
    require(wide(dtype) == acc, f"`beta` is {acc} beside {dtype}")
    for name in ("q", "k"):
        expect(specs, name, "num_tokens", k_heads * key_dim, dtype=dtype)
    expect(specs, "cu_seqlens", "num_seqs+1", dtype="i32")
    widths = {"u": v_heads * value_dim, "w": v_heads * key_dim, "mix": v_heads * DELTA_CHUNK}
    made = {
        name: TensorSpec.of(shape=("num_tokens", size), dtype=dtype)
        for name, size in widths.items()
    }
    return made | {"total": TensorSpec.of(shape=("num_tokens", v_heads), dtype=acc)}


def _delta_scan(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    expect_seq_metadata(specs)
    k_heads, v_heads = integer(attrs, "num_k_heads"), integer(attrs, "num_v_heads")
    key_dim, value_dim = integer(attrs, "key_dim"), integer(attrs, "value_dim")
    widths = {
        "q": k_heads * key_dim,
        "k": k_heads * key_dim,
        "u": v_heads * value_dim,
        "w": v_heads * key_dim,
        "mix": v_heads * DELTA_CHUNK,
    }
    for name, size in widths.items():
        expect(specs, name, "num_tokens", size, dtype=dtype_attr(attrs))
    acc = expect(specs, "total", "num_tokens", v_heads, dtype=wide(dtype_attr(attrs))).dtype
    _ssm_state(attrs, specs, acc)
    return {"y": TensorSpec.of(shape=("num_tokens", v_heads * value_dim), dtype=dtype_attr(attrs))}


def _gated_norm(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    expect(specs, "w", integer(attrs, "head_dim"))
    require(specs["x"] == specs["z"], "`x` and `z` differ")
    expect(specs, "x", rows(specs, "x"), integer(attrs, "num_heads") * integer(attrs, "head_dim"))
    return {"y": specs["x"]}


DELTA_NET_OPS: dict[str, OpDef] = {
    "causal_conv": OpDef(
        inputs=("x", *SEQ_METADATA),
        outputs=("y",),
        infer=_conv,
        doc="y[t] = silu(sum_j w[j] x[t - K + 1 + j])",
        weights=("w",),
        states=(("conv_state", "update"),),
        attrs=("mode", "kernel_size"),
        optional=("query_len",),
    ),
    "recompute_state": OpDef(
        inputs=("x", "b", "a", "context_lens", "state_lens", "src_state_slots", "dst_state_slots"),
        outputs=(),
        infer=_recompute_state,
        doc=(
            "n = context_lens - R - state_lens; states[dst] = states[src] after the first n "
            "inputs kept in src; kept inputs[dst] = x, b, a"
        ),
        weights=("w", "a_log", "dt_bias"),
        states=tuple(
            (name, "update") for name in ("conv_state", "ssm_state", "kept_inputs", "kept_gates")
        ),
        attrs=("kernel_size", "num_k_heads", "num_v_heads", "key_dim", "value_dim"),
        optional=("query_len",),
    ),
    "commit_state_len": OpDef(
        inputs=("context_lens",),
        outputs=(),
        infer=_commit_state_len,
        doc="state_lens = context_lens - R",
        states=(("state_lens", "update"),),
        optional=("query_len",),
    ),
    "qk_l2_norm": OpDef(
        inputs=("x",),
        outputs=("q", "k", "v"),
        infer=_qk_l2_norm,
        doc="q = q / |q| / sqrt(key_dim); k = k / |k|; v = v",
        attrs=("num_k_heads", "num_v_heads", "key_dim", "value_dim"),
    ),
    "delta_gates": OpDef(
        inputs=("b", "a"),
        outputs=("beta", "log_decay"),
        infer=_delta_gates,
        doc="beta = sigmoid(b); log_decay = -exp(a_log) softplus(a + dt_bias)",
        weights=("a_log", "dt_bias"),
    ),
    "delta_rule": OpDef(
        inputs=("q", "k", "v", "beta", "log_decay", *SEQ_METADATA),
        outputs=("y",),
        infer=_delta_rule,
        doc="g = log_decay; S = e^g S; S += k (beta (v - S^T k))^T; y = S^T q",
        states=(("ssm_state", "update"),),
        attrs=("mode", "num_k_heads", "num_v_heads", "key_dim", "value_dim"),
        optional=("query_len",),
    ),
    "delta_chunk": OpDef(
        inputs=("q", "k", "v", "beta", "log_decay", "cu_seqlens"),
        outputs=("u", "w", "mix", "total"),
        infer=_delta_chunk,
        doc=(
            "per chunk of 64 tokens: A = I + strict_lower(beta K K^T * D); u = A^-1 beta V; w = "
            "A^-1 beta e^G K; mix = (Q K^T) * D; total = G"
        ),
        attrs=("num_k_heads", "num_v_heads", "key_dim", "value_dim"),
    ),
    "delta_scan": OpDef(
        inputs=("q", "k", "u", "w", "mix", "total", *SEQ_METADATA),
        outputs=("y",),
        infer=_delta_scan,
        doc="U = u - w S; y = e^G Q S + mix U; S = e^G_last S + (e^(G_last - G) K)^T U",
        states=(("ssm_state", "update"),),
        attrs=("num_k_heads", "num_v_heads", "key_dim", "value_dim", "dtype"),
    ),
    "gated_norm": OpDef(
        inputs=("x", "z"),
        outputs=("y",),
        infer=_gated_norm,
        doc="y = x / sqrt(mean(x^2) + eps) * w * silu(z), per head",
        weights=("w",),
        attrs=("eps", "num_heads", "head_dim"),
    ),
}
