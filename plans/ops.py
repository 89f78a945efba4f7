"""The operators: what each takes, gives and touches, and which shapes fit together.

One row per operator in `OPS`. The planner builds graphs from these rows, the validator checks plans
against them, and `runtime/reference` and `codegen/templates` give each row its two bodies.

Shapes: T tokens, S sequences, H hidden, V vocabulary rows, D head_dim, Q query heads, K kv heads,
A delta-rule key heads, B delta-rule value heads, E experts on this rank, k experts per token.

A decode step that verifies drafts has R = `query_len` rows of each sequence, one after the other,
so that T = S * R. It leaves a state after each row; or N inputs are kept, and the next step begins
with those that came true (`replay`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from tokenspeed_plan.plans.types import Attr, Dim, DType, TensorSpec

DELTA_CHUNK = 64  # tokens of a chunk of the delta rule

Access = Literal["read", "write", "update"]
Attrs = Mapping[str, Attr]
Specs = Mapping[str, TensorSpec]


class ShapeError(ValueError):
    """The tensors of an operator do not fit together."""


@dataclass(frozen=True, slots=True)
class OpDef:
    """One operator.

    Attributes:
        inputs: activations and metadata that it reads.
        outputs: what it writes, in order; `linear` may have any number.
        weights: parameters that it reads.
        states: persistent buffers that outlive the step, with the access.
        attrs: names of its constants. optional: of those that may be left out.
        infer: the output specs, from constants and inputs; raises `ShapeError`.
        doc: the formula.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    infer: Callable[[Attrs, Specs], dict[str, TensorSpec]]
    doc: str
    weights: tuple[str, ...] = ()
    states: tuple[tuple[str, Access], ...] = ()
    attrs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    @property
    def operands(self) -> tuple[str, ...]:
        """Everything that it reads or updates, in argument order."""
        return self.inputs + self.weights + tuple(name for name, _ in self.states)


def require(condition: bool, message: str) -> None:
    """Raise `ShapeError` unless the condition holds."""
    if not condition:
        raise ShapeError(message)


def integer(attrs: Attrs, name: str) -> int:
    """The positive integer constant `name`."""
    value = attrs.get(name)
    fits = isinstance(value, int) and not isinstance(value, bool) and value > 0
    require(fits, f"constant `{name}` is {value!r}, not a positive integer")
    return value  # type: ignore[return-value]


def number(attrs: Attrs, name: str) -> float:
    """The positive finite constant `name`."""
    value = attrs.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ShapeError(f"constant `{name}` is {value!r}, not a positive number")
    return float(value)


def check_numbers(attrs: Attrs) -> None:
    """The constants that no shape depends on."""
    for name in ("eps", "theta", "factor"):
        if name in attrs:
            number(attrs, name)


def expect(specs: Specs, name: str, *shape: Dim, dtype: DType | None = None) -> TensorSpec:
    """The operand `name`, which must have this shape and, where given, this dtype."""
    spec = specs[name]
    require(spec.shape == shape, f"`{name}` is {list(spec.shape)} where {list(shape)} is needed")
    require(
        dtype is None or spec.dtype == dtype, f"`{name}` is {spec.dtype} where {dtype} is needed"
    )
    return spec


def width(specs: Specs, name: str) -> int:
    """The last dimension of `name`, an integer."""
    dim = specs[name].shape[-1] if specs[name].shape else None
    require(isinstance(dim, int), f"`{name}` has no fixed last dimension")
    return dim  # type: ignore[return-value]


def rows(specs: Specs, name: str) -> Dim:
    """The leading dimension of the matrix `name`."""
    require(len(specs[name].shape) == 2, f"`{name}` is {list(specs[name].shape)}, not a matrix")
    return specs[name].shape[0]


def wide(dtype: DType) -> DType:
    """The accumulation dtype: fp32, or fp64 where the plan computes in fp64."""
    return "fp64" if dtype == "fp64" else "fp32"


def dtype_attr(attrs: Attrs) -> DType:
    """The constant `dtype`: what an operator that computes in the accumulation dtype gives back."""
    value = attrs.get("dtype")
    require(value in ("fp64", "fp32", "bf16"), f"dtype {value!r}")
    return value  # type: ignore[return-value]


def query_len(attrs: Attrs) -> int:
    """How many rows each sequence has in a decode step: 1 where nothing is said."""
    return integer(attrs, "query_len") if "query_len" in attrs else 1


def _batch_rows(specs: Specs, name: str) -> Dim:
    """`num_tokens`, or `num_seqs` where each sequence has one row: the leading dimension of a matrix."""
    dim = rows(specs, name)
    require(dim in ("num_tokens", "num_seqs"), f"`{name}` has {dim} rows")
    return dim


def _like(specs: Specs, name: str, last: int) -> TensorSpec:
    return TensorSpec.of(shape=(rows(specs, name), last), dtype=specs[name].dtype)


def _seq_metadata(specs: Specs) -> None:
    expect(specs, "cu_seqlens", "num_seqs+1", dtype="i32")
    expect(specs, "src_state_slots", "num_seqs", dtype="i32")
    _dst_state_slots(specs, 1)


def _dst_state_slots(specs: Specs, needed: int) -> None:
    """One row a sequence, or in a plan that speculates a row for each token that a decode step can have."""
    shape = specs["dst_state_slots"].shape
    many = len(shape) == 2 and isinstance(shape[1], int) and shape[1] >= max(needed, 2)
    require(
        many or (needed == 1 and shape == ("num_seqs",)),
        f"`dst_state_slots` is {list(shape)} for {needed} rows",
    )
    expect(specs, "dst_state_slots", "num_seqs", *shape[1:], dtype="i32")


def _embed(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    shape = specs["token_ids"].shape
    dim: Dim = "num_seqs" if len(shape) == 2 else "num_tokens"
    expect(specs, "token_ids", dim, *shape[1:], dtype="i32")
    require(len(specs["table"].shape) == 2, "`table` is not a matrix")
    return {"y": TensorSpec.of(shape=(dim, width(specs, "table")), dtype=specs["table"].dtype)}


def _rms_norm(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    expect(specs, "w", width(specs, "x"))
    return {"y": _like(specs, "x", width(specs, "x"))}


def _head_norm(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    expect(specs, "w", integer(attrs, "head_dim"))
    expect(specs, "x", rows(specs, "x"), integer(attrs, "num_heads") * integer(attrs, "head_dim"))
    return {"y": specs["x"]}


def _linear(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    splits = attrs["splits"]
    fits = isinstance(splits, tuple) and all(0 < size < 1 << 31 for size in splits)
    require(fits and bool(splits), f"splits {splits!r}")
    assert isinstance(splits, tuple)
    expect(specs, "w", sum(splits), width(specs, "x"), dtype=specs["x"].dtype)
    return {f"y{i}": _like(specs, "x", part) for i, part in enumerate(splits)}


def _split_gate(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    half = integer(attrs, "num_heads") * integer(attrs, "head_dim")
    expect(specs, "qg", rows(specs, "qg"), 2 * half)
    return {"q": _like(specs, "qg", half), "gate": _like(specs, "qg", half)}


def _rope(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    head_dim, rotary_dim = integer(attrs, "head_dim"), integer(attrs, "rotary_dim")
    require(
        0 < rotary_dim <= head_dim and rotary_dim % 2 == 0,
        f"rotary_dim {rotary_dim} of head_dim {head_dim}",
    )
    dim = _batch_rows(specs, "x")
    expect(specs, "positions", dim, dtype="i32")
    return {"y": expect(specs, "x", dim, integer(attrs, "num_heads") * head_dim)}


def _kv_cache(attrs: Attrs, specs: Specs) -> None:
    heads, head_dim, page = (
        integer(attrs, name) for name in ("num_kv_heads", "head_dim", "page_size")
    )
    shape = specs["kv_cache"].shape
    require(
        shape[1:] == (2, page, heads, head_dim),
        f"`kv_cache` is {list(shape)}: pages of [2, {page}, {heads}, ...]",
    )


def _kv_write(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    _kv_cache(attrs, specs)
    row = integer(attrs, "num_kv_heads") * integer(attrs, "head_dim")
    dim = _batch_rows(specs, "k")
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
    dim, decode = _batch_rows(specs, "q"), attrs.get("mode") == "decode"
    require(decode or dim == "num_tokens", "a prefill has many rows a sequence")
    require(
        query_len(attrs) == 1 or (decode and dim == "num_tokens"), "query_len of one row a sequence"
    )
    return {"y": expect(specs, "q", dim, heads * integer(attrs, "head_dim"))}


def _pair(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    require(specs["x"] == specs["g"], "operands differ")
    return {"y": specs["x"]}


def _stepping(attrs: Attrs, specs: Specs, step: str, many: str) -> None:
    """The mode of an operator with recurrent state: a decode step, whose rows leave a state each, or many tokens.

    Or a step after a `replay`: it starts from the rows to write, where that has left the state, and
    changes nothing.
    """
    require(attrs.get("mode") in (step, many, RECOMPUTED), f"mode {attrs.get('mode')!r}")
    require(attrs["mode"] != many or query_len(attrs) == 1, f"query_len where the mode is {many}")
    _dst_state_slots(specs, 1 if attrs["mode"] == RECOMPUTED else query_len(attrs))


def _conv(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    _seq_metadata(specs)
    _stepping(attrs, specs, "update", "varlen")
    channels, taps = width(specs, "x"), integer(attrs, "kernel_size")
    expect(specs, "w", channels, 1, taps)
    require(
        specs["conv_state"].shape[1:] == (taps - 1, channels),
        f"`conv_state` is {list(specs['conv_state'].shape)}",
    )
    return {"y": expect(specs, "x", "num_tokens", channels)}


def _recompute_state(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    heads, taps = integer(attrs, "num_v_heads"), integer(attrs, "kernel_size")
    channels = 2 * integer(attrs, "num_k_heads") * integer(attrs, "key_dim") + heads * integer(
        attrs, "value_dim"
    )
    x = expect(specs, "x", "num_tokens", channels)
    for name in ("b", "a"):
        expect(specs, name, "num_tokens", heads, dtype=x.dtype)
    for name in ("context_lens", "state_lens", "src_state_slots", "dst_state_slots"):
        expect(specs, name, "num_seqs", dtype="i32")
    expect(specs, "w", channels, 1, taps)
    expect(specs, "a_log", heads)
    expect(specs, "dt_bias", heads)
    require(
        specs["conv_state"].shape[1:] == (taps - 1, channels),
        f"`conv_state` is {list(specs['conv_state'].shape)}",
    )
    _ssm_state(attrs, specs, wide(x.dtype))
    kept = specs["kept_inputs"].shape[1:2]
    require(kept >= (query_len(attrs),), f"{list(kept)} inputs are kept of {query_len(attrs)} rows")
    shapes = {"kept_inputs": (*kept, channels), "kept_gates": (2, *kept, heads)}
    for name, shape in shapes.items():
        require(specs[name].shape[1:] == shape, f"`{name}` is {list(specs[name].shape)}")
        require(specs[name].dtype == x.dtype, f"`{name}` is {specs[name].dtype}")
    return {}


def _commit_state_len(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    for name in ("context_lens", "state_lens"):
        expect(specs, name, "num_seqs", dtype="i32")
    require(query_len(attrs) > 0, "no rows")
    return {}


def _qk_l2_norm(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    key = integer(attrs, "num_k_heads") * integer(attrs, "key_dim")
    value = integer(attrs, "num_v_heads") * integer(attrs, "value_dim")
    x = expect(specs, "x", "num_tokens", 2 * key + value)
    out = TensorSpec.of(shape=("num_tokens", key), dtype=x.dtype)
    return {"q": out, "k": out, "v": TensorSpec.of(shape=("num_tokens", value), dtype=x.dtype)}


def _delta_gates(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    heads = width(specs, "b")
    require(specs["a"] == specs["b"], "`a` and `b` differ")
    expect(specs, "a_log", heads)
    expect(specs, "dt_bias", heads)
    out = TensorSpec.of(shape=("num_tokens", heads), dtype=wide(specs["b"].dtype))
    return {"beta": out, "log_decay": out}


def _delta_rule(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    _seq_metadata(specs)
    _stepping(attrs, specs, "recurrent", "chunked")
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
    state, wanted = (
        specs["ssm_state"],
        tuple(integer(attrs, name) for name in ("num_v_heads", "key_dim", "value_dim")),
    )
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
    _seq_metadata(specs)
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


def _add(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    require(specs["x"] == specs["r"], "operands differ")
    return {"y": specs["x"]}


def _silu_mul(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    require(width(specs, "x") % 2 == 0, "gate and up halves differ")
    return {"y": _like(specs, "x", width(specs, "x") // 2)}


def _topk(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    chosen = integer(attrs, "top_k")
    require(0 < chosen <= width(specs, "logits"), f"top {chosen} of {width(specs, 'logits')}")
    ids = TensorSpec.of(shape=(rows(specs, "logits"), chosen), dtype="i32")
    return {"weights": _like(specs, "logits", chosen), "ids": ids}


def _experts_up(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    shape = specs["w"].shape
    require(len(shape) == 3 and shape[2] == width(specs, "x"), f"`w` is {list(shape)}")
    require(shape[0] == integer(attrs, "num_experts"), f"`w` holds {shape[0]} experts")
    expect(specs, "ids", rows(specs, "x"), width(specs, "ids"), dtype="i32")
    inner = shape[1]
    require(isinstance(inner, int) and inner % 2 == 0, "gate and up halves differ")
    return {"y": _like(specs, "x", width(specs, "ids") * inner // 2)}  # type: ignore[operator]


def _experts_down(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    chosen, shape = width(specs, "ids"), specs["w"].shape
    require(len(shape) == 3 and shape[0] == integer(attrs, "num_experts"), f"`w` is {list(shape)}")
    require(
        isinstance(shape[2], int) and width(specs, "h") == chosen * shape[2],
        f"`w` is {list(shape)}",
    )
    expect(specs, "weights", rows(specs, "h"), chosen)
    return {"y": _like(specs, "h", shape[1])}  # type: ignore[arg-type]


def _expert_sort(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    ids = expect(specs, "ids", rows(specs, "ids"), width(specs, "ids"), dtype="i32")
    return {
        "order": ids,
        "bounds": TensorSpec.of(shape=(integer(attrs, "num_experts") + 1,), dtype="i32"),
    }


def _sorted_experts(attrs: Attrs, specs: Specs, x: str) -> tuple[int, int]:
    """Rows and columns of one expert's matrix."""
    experts, shape = integer(attrs, "num_experts"), specs["w"].shape
    require(len(shape) == 3 and shape[0] == experts, f"`w` is {list(shape)}")
    expect(specs, "order", rows(specs, x), width(specs, "order"), dtype="i32")
    expect(specs, "bounds", experts + 1, dtype="i32")
    _, out, inner = shape
    require(isinstance(out, int) and isinstance(inner, int), f"`w` is {list(shape)}")
    return out, inner  # type: ignore[return-value]


def _grouped_up(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    inner, hidden = _sorted_experts(attrs, specs, "x")
    require(hidden == width(specs, "x") and inner % 2 == 0, f"`w` is {specs['w'].shape}")
    return {"y": _like(specs, "x", width(specs, "order") * inner // 2)}


def _grouped_down(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    hidden, inner = _sorted_experts(attrs, specs, "h")
    chosen = width(specs, "order")
    require(width(specs, "h") == chosen * inner, f"`w` is {specs['w'].shape}")
    return {"y": _like(specs, "h", chosen * hidden)}


def _expert_sum(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    chosen = width(specs, "weights")
    expect(specs, "weights", rows(specs, "d"), chosen, dtype=specs["d"].dtype)
    require(width(specs, "d") % chosen == 0, f"{width(specs, 'd')} columns of {chosen} experts")
    return {"y": _like(specs, "d", width(specs, "d") // chosen)}


def _all_reduce(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    require(integer(attrs, "num_ranks") > 1, "one rank has nobody to add up with")
    return {"y": specs["x"]}


def _gated_add(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    require(specs["x"] == specs["r"], "operands differ")
    expect(specs, "g", rows(specs, "x"), 1)
    return {"y": specs["x"]}


def _last_token(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    expect(specs, "cu_seqlens", "num_seqs+1", dtype="i32")
    expect(specs, "x", "num_tokens", width(specs, "x"))
    return {"y": TensorSpec.of(shape=("num_seqs", width(specs, "x")), dtype=specs["x"].dtype)}


def _select_row(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    integer(attrs, "query_len")
    expect(specs, "accepted", "num_seqs", dtype="i32")
    expect(specs, "x", "num_tokens", width(specs, "x"))
    return {"y": TensorSpec.of(shape=("num_seqs", width(specs, "x")), dtype=specs["x"].dtype)}


def _concat(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    require(specs["x"] == specs["r"], "operands differ")
    return {"y": _like(specs, "x", 2 * width(specs, "x"))}


def _sample(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    require(
        0 < integer(attrs, "num_valid_tokens") <= width(specs, "logits"),
        "num_valid_tokens over the vocabulary",
    )
    dim: Dim = "num_tokens" if query_len(attrs) > 1 else "num_seqs"
    expect(specs, "logits", dim, width(specs, "logits"))
    for name, dtype in SAMPLING_INPUTS.items():
        expect(specs, name, "num_seqs", dtype=dtype)
    return {"next_tokens": TensorSpec.of(shape=(dim,), dtype="i32")}


def _shift_tokens(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    expect(specs, "cu_seqlens", "num_seqs+1", dtype="i32")
    for name in ("following", "next_tokens"):
        expect(specs, name, "num_seqs", dtype="i32")
    return {"y": expect(specs, "token_ids", "num_tokens", dtype="i32")}


def _accept(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    depth = integer(attrs, "query_len") - 1
    require(depth > 0, "there is nothing to accept")
    for name in ("token_ids", "next_tokens"):
        expect(specs, name, "num_tokens", dtype="i32")
    for name in ("context_lens", "src_state_slots", "max_lens"):
        expect(specs, name, "num_seqs", dtype="i32")
    expect(specs, "stop_ids", "num_seqs", STOP_IDS, dtype="i32")
    for name in ("seed", "rng_offset"):
        expect(specs, name, "num_seqs", dtype="i64")
    rows: dict[str, DType] = {"forced_accept": "fp32", "accept_counts": "i64"}
    for name, dtype in rows.items():
        require(
            len(specs[name].shape) == 1 and width(specs, name) > depth,
            f"`{name}` for depth {depth}",
        )
        require(specs[name].dtype == dtype, f"`{name}` is {specs[name].dtype}")
    return {
        name: TensorSpec.of(shape=("num_seqs",), dtype="i32")
        for name in ("accepted", "lens", "last_tokens")
    }


def _draft(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    expect(specs, "logits", "num_seqs", width(specs, "logits"))
    shape = specs["earlier"].shape
    known = shape[1] if len(shape) == 2 else 1
    require(isinstance(known, int), f"`earlier` is {list(shape)}")
    expect(specs, "earlier", "num_seqs", *shape[1:], dtype="i32")
    return {"drafts": TensorSpec.of(shape=("num_seqs", int(known) + 1), dtype="i32")}


def _draft_place(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    integer(attrs, "page_size"), integer(attrs, "step")
    lens = expect(specs, "lens", "num_seqs", dtype="i32")
    expect(specs, "page_table", "num_seqs", width(specs, "page_table"), dtype="i32")
    return dict.fromkeys(("positions", "slot_mapping", "context_lens"), lens)


def _advance(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    integer(attrs, "page_size")
    expect(specs, "next_tokens", "num_seqs", dtype="i32")
    _batch_state(specs, 1)
    return {}


def _advance_rows(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    integer(attrs, "page_size")
    count = integer(attrs, "query_len")
    require(count > 1, "one row a sequence is what `advance` moves on")
    expect(specs, "accepted", "num_seqs", dtype="i32")
    expect(specs, "drafts", "num_seqs", count, dtype="i32")
    _batch_state(specs, 1 if specs["dst_state_slots"].shape == ("num_seqs",) else count)
    return {}


def _batch_state(specs: Specs, count: int) -> None:
    expect(specs, "page_table", "num_seqs", width(specs, "page_table"), dtype="i32")
    for name in ("token_ids", "positions", "slot_mapping"):
        expect(specs, name, "num_tokens", dtype="i32")
    for name in ("context_lens", "src_state_slots"):
        expect(specs, name, "num_seqs", dtype="i32")
    expect(specs, "rng_offset", "num_seqs", dtype="i64")
    _dst_state_slots(specs, count)


# tokens a sequence that `accept` stops at; what else ends an answer is found on the host
STOP_IDS = 8
RECOMPUTED = "recomputed"  # the mode of a step that finds its state where `replay` has left it
BATCH_STATE = (
    "token_ids",
    "positions",
    "slot_mapping",
    "context_lens",
    "src_state_slots",
    "dst_state_slots",
    "rng_offset",
)
SAMPLING_INPUTS: dict[str, DType] = {
    "temperature": "fp32",
    "top_p": "fp32",
    "top_k": "i32",
    "seed": "i64",
    "rng_offset": "i64",
}

_CONV_META = ("cu_seqlens", "src_state_slots", "dst_state_slots")

_ACCEPT_INPUTS = (
    "max_lens",
    "stop_ids",
    "following",
    "forced_accept",
    "accept_counts",
    "state_lens",
)

# Operands of these roles are the io buffers of the same name: many have one shape, and only the
# name tells them apart.
BATCH_INPUTS = frozenset(
    (*BATCH_STATE, *SAMPLING_INPUTS, "page_table", "cu_seqlens", *_ACCEPT_INPUTS)
)
# Or, in the passes that draft, what an operator before them made for this role: role -> (operator,
# its output).
DRAFT_INPUTS: Mapping[str, frozenset[tuple[str, str]]] = {
    "token_ids": frozenset({("shift_tokens", "y"), ("sample", "next_tokens"), ("draft", "drafts")}),
    "positions": frozenset({("draft_place", "positions")}),
    "slot_mapping": frozenset({("draft_place", "slot_mapping")}),
    "context_lens": frozenset({("draft_place", "context_lens"), ("accept", "lens")}),
}
OPS: dict[str, OpDef] = {
    # Of a matrix of ids, a sequence a row, the last column counts: the draft that was made last.
    "embed": OpDef(
        ("token_ids",),
        ("y",),
        _embed,
        "y = table[token_ids]; ids of other ranks give 0",
        ("table",),
    ),
    "rms_norm": OpDef(
        ("x",), ("y",), _rms_norm, "y = x / sqrt(mean(x^2) + eps) * (1 + w)", ("w",), attrs=("eps",)
    ),
    "head_norm": OpDef(
        ("x",),
        ("y",),
        _head_norm,
        "rms_norm of each head",
        ("w",),
        attrs=("eps", "num_heads", "head_dim"),
    ),
    "linear": OpDef(
        ("x",), ("y0",), _linear, "y = x w^T, cut into `splits` columns", ("w",), attrs=("splits",)
    ),
    "split_gate": OpDef(
        ("qg",),
        ("q", "gate"),
        _split_gate,
        "per head: first half q, second half gate",
        attrs=("num_heads", "head_dim"),
    ),
    "rope": OpDef(
        ("x", "positions"),
        ("y",),
        _rope,
        "rotate the first `rotary_dim` of each head, half-split pairs",
        attrs=("num_heads", "head_dim", "rotary_dim", "theta", "factor", "original_max_positions"),
    ),
    "kv_write": OpDef(
        ("k", "v", "slot_mapping"),
        (),
        _kv_write,
        "kv_cache[slot] = k, v",
        states=(("kv_cache", "write"),),
        attrs=("num_kv_heads", "head_dim", "page_size"),
    ),
    "attention": OpDef(
        ("q", "page_table", "context_lens", "cu_seqlens"),
        ("y",),
        _attention,
        "softmax(q k^T / sqrt(D)) v, causal",
        states=(("kv_cache", "read"),),
        attrs=("mode", "num_heads", "num_kv_heads", "head_dim", "page_size"),
        optional=("query_len",),
    ),
    "sigmoid_gate": OpDef(("x", "g"), ("y",), _pair, "y = x * sigmoid(g)"),
    "causal_conv": OpDef(
        ("x", *_CONV_META),
        ("y",),
        _conv,
        "y[t] = silu(sum_j w[j] x[t - K + 1 + j])",
        ("w",),
        states=(("conv_state", "update"),),
        attrs=("mode", "kernel_size"),
        optional=("query_len",),
    ),
    # b and a of `kept_gates` come one after the other; rows of it and of `kept_inputs` are those of
    # the states.
    "recompute_state": OpDef(
        ("x", "b", "a", "context_lens", "state_lens", "src_state_slots", "dst_state_slots"),
        (),
        _recompute_state,
        "the states of src_state_slots, after the first context_lens - R - state_lens inputs kept there, go to dst_state_slots; "
        "x, b and a are kept there",
        ("w", "a_log", "dt_bias"),
        states=tuple(
            (name, "update") for name in ("conv_state", "ssm_state", "kept_inputs", "kept_gates")
        ),
        attrs=("kernel_size", "num_k_heads", "num_v_heads", "key_dim", "value_dim"),
        optional=("query_len",),
    ),
    "commit_state_len": OpDef(
        ("context_lens",),
        (),
        _commit_state_len,
        "state_lens = context_lens - R: so far has `replay` brought the states",
        states=(("state_lens", "update"),),
        optional=("query_len",),
    ),
    "qk_l2_norm": OpDef(
        ("x",),
        ("q", "k", "v"),
        _qk_l2_norm,
        "q = q / |q| / sqrt(key_dim), k = k / |k|, v as it is",
        attrs=("num_k_heads", "num_v_heads", "key_dim", "value_dim"),
    ),
    "delta_gates": OpDef(
        ("b", "a"),
        ("beta", "log_decay"),
        _delta_gates,
        "sigmoid(b), -exp(a_log) softplus(a + dt_bias)",
        ("a_log", "dt_bias"),
    ),
    "delta_rule": OpDef(
        ("q", "k", "v", "beta", "log_decay", *_CONV_META),
        ("y",),
        _delta_rule,
        "S = e^g S; S += k (beta (v - S^T k))^T; y = S^T q",
        states=(("ssm_state", "update"),),
        attrs=("mode", "num_k_heads", "num_v_heads", "key_dim", "value_dim"),
        optional=("query_len",),
    ),
    "delta_chunk": OpDef(
        ("q", "k", "v", "beta", "log_decay", "cu_seqlens"),
        ("u", "w", "mix", "total"),
        _delta_chunk,
        "per chunk of 64 tokens: A = I + strict_lower(beta K K^T * D); u = A^-1 beta V; w = A^-1 beta e^G K; "
        "mix = (Q K^T) * D; total = G",
        attrs=("num_k_heads", "num_v_heads", "key_dim", "value_dim"),
    ),
    "delta_scan": OpDef(
        ("q", "k", "u", "w", "mix", "total", *_CONV_META),
        ("y",),
        _delta_scan,
        "U = u - w S; y = e^G Q S + mix U; S = e^G_last S + (e^(G_last - G) K)^T U",
        states=(("ssm_state", "update"),),
        attrs=("num_k_heads", "num_v_heads", "key_dim", "value_dim", "dtype"),
    ),
    "gated_norm": OpDef(
        ("x", "z"),
        ("y",),
        _gated_norm,
        "y = x / sqrt(mean(x^2) + eps) * w * silu(z), per head",
        ("w",),
        attrs=("eps", "num_heads", "head_dim"),
    ),
    "add": OpDef(("x", "r"), ("y",), _add, "y = x + r"),
    "silu_mul": OpDef(("x",), ("y",), _silu_mul, "y = silu(x[:, :n]) * x[:, n:]"),
    "topk": OpDef(
        ("logits",),
        ("weights", "ids"),
        _topk,
        "softmax, k largest, divided by their sum",
        attrs=("top_k",),
    ),
    "experts_up": OpDef(
        ("x", "ids"),
        ("y",),
        _experts_up,
        "y[t, j] = silu(x G^T) * (x U^T) of expert ids[t, j]",
        ("w",),
        attrs=("num_experts",),
    ),
    "experts_down": OpDef(
        ("h", "ids", "weights"),
        ("y",),
        _experts_down,
        "y[t] = sum_j weights[t, j] h[t, j] D^T",
        ("w",),
        attrs=("num_experts",),
    ),
    "expert_sort": OpDef(
        ("ids",),
        ("order", "bounds"),
        _expert_sort,
        "flat places of `ids` by expert, other ranks' last; bounds[e] is where expert e begins",
        attrs=("num_experts",),
    ),
    "grouped_up": OpDef(
        ("x", "order", "bounds"),
        ("y",),
        _grouped_up,
        "experts_up, one product an expert",
        ("w",),
        attrs=("num_experts",),
    ),
    "grouped_down": OpDef(
        ("h", "order", "bounds"),
        ("y",),
        _grouped_down,
        "y[t, j] = h[t, j] D^T, one product an expert",
        ("w",),
        attrs=("num_experts",),
    ),
    "expert_sum": OpDef(
        ("d", "weights"), ("y",), _expert_sum, "y[t] = sum_j weights[t, j] d[t, j]"
    ),
    "all_reduce": OpDef(
        ("x",), ("y",), _all_reduce, "the sum over all ranks", attrs=("num_ranks",)
    ),
    "gated_add": OpDef(
        ("x", "r", "g"), ("y",), _gated_add, "y = r + x * sigmoid(g), g one scalar a token"
    ),
    "last_token": OpDef(("x", "cu_seqlens"), ("y",), _last_token, "the last row of each sequence"),
    "concat": OpDef(("x", "r"), ("y",), _concat, "y = [x | r]"),
    "select_row": OpDef(
        ("x", "accepted"),
        ("y",),
        _select_row,
        "y[s] = x[s * R + accepted[s]]",
        attrs=("query_len",),
    ),
    "advance": OpDef(
        ("next_tokens", "page_table"),
        (),
        _advance,
        "inputs of the next decode step; padding (src_state_slots = 0) stays",
        states=tuple((name, "update") for name in BATCH_STATE),
        attrs=("page_size",),
    ),
    # Row i of a sequence is token `rng_offset + i`, drawn as it would be alone.
    "sample": OpDef(
        ("logits", *SAMPLING_INPUTS),
        ("next_tokens",),
        _sample,
        "argmax, or a draw after top-k and top-p",
        attrs=("num_valid_tokens",),
        optional=("query_len",),
    ),
    "shift_tokens": OpDef(
        ("token_ids", "following", "next_tokens", "cu_seqlens"),
        ("y",),
        _shift_tokens,
        "y[t] = token_ids[t + 1]; at the end of a sequence `following`, or where that is negative `next_tokens`",
    ),
    # `forced_accept` is all zeros but in benchmarks that simulate acceptance: where f =
    # forced_accept[i] is not 0, the draft after row i is right if u < f, whatever it is, and a
    # negative f is never right. u is the number in [0, 1) of the operator `sample` for (seed[s],
    # rng_offset[s] + i): the upper bits of SplitMix64's output for the state seed + (rng_offset + i
    # + 1) * 0x9E3779B97F4A7C15. Rules for ends hold as ever. What is said is then nonsense.
    "accept": OpDef(
        (
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
        ("accepted", "lens", "last_tokens"),
        _accept,
        "n = length of the common prefix of token_ids[1:] and next_tokens, up to the first of `stop_ids` and lens <= "
        "max_lens; lens = context_lens - R + n + 1; last_tokens = next_tokens[n]; accept_counts[:n + 1] += 1",
        states=(("accept_counts", "update"),),
        attrs=("query_len",),
    ),
    "draft_place": OpDef(
        ("lens", "page_table"),
        ("positions", "slot_mapping", "context_lens"),
        _draft_place,
        "where the row after `lens + step - 1` tokens goes; context_lens = lens + step",
        attrs=("page_size", "step"),
    ),
    "draft": OpDef(
        ("logits", "earlier"), ("drafts",), _draft, "drafts = [earlier | argmax(logits)]"
    ),
    "advance_rows": OpDef(
        ("accepted", "drafts", "page_table"),
        (),
        _advance_rows,
        "`advance` by accepted + 1 tokens: `drafts` are the next rows, dst_state_slots[accepted] is read next, or the one",
        states=tuple((name, "update") for name in BATCH_STATE),
        attrs=("page_size", "query_len"),
    ),
}
COLLECTIVES = ("all_reduce", "all_gather")
