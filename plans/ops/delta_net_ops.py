"""The gated delta rule: a convolution and a recurrence, in steps or in chunks.

Letters: T tokens, S sequences, A key heads, B value heads, R query_len, K taps of the convolution,
d and e columns of a key and of a value.

`q` and `k` are [T, A * d], `v` and `y` [T, B * e], `beta` and `log_decay` [T, B]. A state slot
holds `conv_state` [K - 1, 2 * A * d + B * e] and `ssm_state` [B, d, e]; where a step writes the
slot that it reads, `conv_state` is a ring of K inputs. `ssm_state` is in the accumulation dtype, or
in bf16: then a step computes in fp32 what it has read, and rounds what it leaves.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    expect_vectors,
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

_RECOMPUTE_METADATA = ("context_lens", "state_lens", "src_state_slots", "dst_state_slots")


@dataclass(frozen=True, slots=True)
class _HeadSizes:
    """Heads on a rank, and the columns of a key and of a value."""

    k_heads: int
    v_heads: int
    key_dim: int
    value_dim: int

    @classmethod
    def of(cls, attrs: Attrs) -> _HeadSizes:
        return cls(
            k_heads=integer(attrs, "num_k_heads"),
            v_heads=integer(attrs, "num_v_heads"),
            key_dim=integer(attrs, "key_dim"),
            value_dim=integer(attrs, "value_dim"),
        )

    @property
    def keys(self) -> int:
        """Columns of all keys, and as many of all queries."""
        return self.k_heads * self.key_dim

    @property
    def values(self) -> int:
        """Columns of all values."""
        return self.v_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.keys + self.values

    def chunk_widths(self) -> dict[str, int]:
        """Columns of what `delta_chunk` hands to `delta_scan`."""
        return {
            "u": self.values,
            "w": self.v_heads * self.key_dim,
            "mix": self.v_heads * DELTA_CHUNK,
        }

    def check_groups(self) -> None:
        """Each key head serves equally many value heads."""
        fits = self.v_heads % self.k_heads == 0
        require(fits, f"{self.v_heads} value heads over {self.k_heads} key heads")


def _expect_mode(attrs: Attrs, specs: Specs, decode: str, prefill: str) -> None:
    """The mode of an operator with recurrent state.

    In mode `decode` each query writes a state, in mode `prefill` the last token of each sequence
    does. In mode `RECOMPUTED` a decode step reads the state that `recompute_state` left in
    `dst_state_slots`, and writes none.
    """
    mode = attrs.get("mode")
    queries = query_len(attrs)
    require(mode in (decode, prefill, RECOMPUTED), f"mode {mode!r}")
    if mode == prefill:
        require(queries == 1, f"query_len where the mode is {prefill}")
    if mode == RECOMPUTED:
        queries = 1
    expect_dst_state_slots(specs, queries)


def _conv(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    expect_seq_metadata(specs)
    _expect_mode(attrs, specs, "update", "varlen")
    channels = width(specs, "x")
    taps = integer(attrs, "kernel_size")
    expect(specs, "w", channels, 1, taps)
    _expect_conv_state(specs, taps, channels)
    y = expect(specs, "x", "num_tokens", channels)
    return {"y": y}


def _ring_conv(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    expect_seq_metadata(specs)
    expect_vectors(specs, ("context_lens",), "num_seqs", "i32")
    require(attrs.get("mode") in ("update", "varlen"), f"mode {attrs.get('mode')!r}")
    channels = width(specs, "x")
    taps = integer(attrs, "kernel_size")
    expect(specs, "w", channels, 1, taps)
    _expect_conv_state(specs, taps + 1, channels)
    return {"y": expect(specs, "x", "num_tokens", channels)}


def _expect_conv_state(specs: Specs, taps: int, channels: int) -> None:
    """The inputs before the next token: all taps but one."""
    shape = specs["conv_state"].shape
    fits = shape[1:] == (taps - 1, channels)
    require(fits, f"`conv_state` is {list(shape)}")


def _recompute_state(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    sizes = _HeadSizes.of(attrs)
    heads = sizes.v_heads
    taps = integer(attrs, "kernel_size")
    x = expect(specs, "x", "num_tokens", sizes.channels)
    for name in ("b", "a"):
        expect(specs, name, "num_tokens", heads, dtype=x.dtype)
    expect_vectors(specs, _RECOMPUTE_METADATA, "num_seqs", "i32")
    expect(specs, "w", sizes.channels, 1, taps)
    expect(specs, "a_log", heads)
    expect(specs, "dt_bias", heads)
    _expect_conv_state(specs, taps, sizes.channels)
    _ssm_state(sizes, specs, wide(x.dtype))
    _expect_all_kept(sizes, specs, query_len(attrs))
    return {}


def _expect_all_kept(sizes: _HeadSizes, specs: Specs, queries: int) -> None:
    """Each state slot keeps the inputs of at least so many queries, and their gates."""
    dtype = specs["x"].dtype
    kept = specs["kept_inputs"].shape[1:2]
    enough = kept >= (queries,)
    require(enough, f"{list(kept)} inputs are kept of {queries} queries")
    _expect_kept(specs, "kept_inputs", (*kept, sizes.channels), dtype)
    _expect_kept(specs, "kept_gates", (2, *kept, sizes.v_heads), dtype)


def _expect_kept(specs: Specs, name: str, shape: tuple[Dim, ...], dtype: DType) -> None:
    """What is kept in each state slot; b and a of `kept_gates` come one after the other."""
    spec = specs[name]
    fits = spec.shape[1:] == shape
    require(fits, f"`{name}` is {list(spec.shape)}")
    require(spec.dtype == dtype, f"`{name}` is {spec.dtype}")


def _commit_state_len(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    expect_vectors(specs, ("context_lens", "state_lens"), "num_seqs", "i32")
    query_len(attrs)
    return {}


def _qk_l2_norm(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    sizes = _HeadSizes.of(attrs)
    x = expect(specs, "x", "num_tokens", sizes.channels)
    q = x.reshaped(("num_tokens", sizes.keys))
    v = x.reshaped(("num_tokens", sizes.values))
    return {"q": q, "k": q, "v": v}


def _delta_gates(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    b = specs["b"]
    require(specs["a"] == b, "`a` and `b` differ")
    heads = width(specs, "b")
    expect(specs, "a_log", heads)
    expect(specs, "dt_bias", heads)
    out = TensorSpec.of(shape=("num_tokens", heads), dtype=wide(b.dtype))
    return {"beta": out, "log_decay": out}


def _delta_rule(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    expect_seq_metadata(specs)
    _expect_mode(attrs, specs, "recurrent", "chunked")
    sizes = _HeadSizes.of(attrs)
    sizes.check_groups()
    y = expect(specs, "v", "num_tokens", sizes.values)
    acc = wide(y.dtype)
    for name in ("q", "k"):
        expect(specs, name, "num_tokens", sizes.keys, dtype=y.dtype)
    for name in ("beta", "log_decay"):
        expect(specs, name, "num_tokens", sizes.v_heads, dtype=acc)
    _ssm_state(sizes, specs, acc)
    return {"y": y}


def _ssm_state(sizes: _HeadSizes, specs: Specs, acc: DType) -> None:
    """A matrix of key times value for each value head; it may be stored in less than it has."""
    state = specs["ssm_state"]
    wanted = (sizes.v_heads, sizes.key_dim, sizes.value_dim)
    fits = state.shape[1:] == wanted
    require(fits, f"`ssm_state` is {list(state.shape)}")
    fits = state.dtype == acc or (state.dtype, acc) == ("bf16", "fp32")
    require(fits, f"`ssm_state` is {state.dtype} where {acc} is needed")


def _delta_chunk(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    sizes = _HeadSizes.of(attrs)
    sizes.check_groups()
    beta = expect(specs, "beta", "num_tokens", sizes.v_heads)
    acc = beta.dtype
    expect(specs, "log_decay", "num_tokens", sizes.v_heads, dtype=acc)
    v = expect(specs, "v", "num_tokens", sizes.values)
    require(wide(v.dtype) == acc, f"`beta` is {acc} beside {v.dtype}")
    for name in ("q", "k"):
        expect(specs, name, "num_tokens", sizes.keys, dtype=v.dtype)
    expect(specs, "cu_seqlens", "num_seqs+1", dtype="i32")
    made = {}
    for name, columns in sizes.chunk_widths().items():
        made[name] = v.reshaped(("num_tokens", columns))
    return made | {"total": beta}


def _delta_scan(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    expect_seq_metadata(specs)
    sizes = _HeadSizes.of(attrs)
    dtype = dtype_attr(attrs)
    acc = wide(dtype)
    widths = {"q": sizes.keys, "k": sizes.keys, **sizes.chunk_widths()}
    for name, columns in widths.items():
        expect(specs, name, "num_tokens", columns, dtype=dtype)
    expect(specs, "total", "num_tokens", sizes.v_heads, dtype=acc)
    _ssm_state(sizes, specs, acc)
    y = TensorSpec.of(shape=("num_tokens", sizes.values), dtype=dtype)
    return {"y": y}


def _gated_norm(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    heads = integer(attrs, "num_heads")
    head_dim = integer(attrs, "head_dim")
    expect(specs, "w", head_dim)
    require(specs["x"] == specs["z"], "`x` and `z` differ")
    y = expect(specs, "x", rows(specs, "x"), heads * head_dim)
    return {"y": y}


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
    # The same where a step writes the state slot that it reads. The input at position p is entry
    # p % K of the ring: a token writes the one entry that it does not read.
    "ring_conv": OpDef(
        inputs=("x", *SEQ_METADATA, "context_lens"),
        outputs=("y",),
        infer=_ring_conv,
        doc="y[t] = silu(sum_j w[j] x[t - K + 1 + j]); conv_state[p % K] = x at position p",
        weights=("w",),
        states=(("conv_state", "update"),),
        attrs=("mode", "kernel_size"),
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
