"""Routed experts: choice, products one token or one expert at a time, and the sum.

Letters: T tokens, H hidden, E experts on this rank, k experts a token, n inner columns; t a token,
j one of its experts, e an expert.

`x` is [T, H], `logits` [T, experts], `ids`, `weights` and `order` [T, k], `bounds` [E + 1], the
inner activation `h` [T, k * n]. The weight `w` of the up projections is [E, 2 * n, H], that of the
down projection [E, H, n].
"""

from __future__ import annotations

from tokenspeed_plan.plans.ops.op_def import (
    Attrs,
    OpDef,
    ShapeError,
    Specs,
    expect,
    expect_stored,
    integer,
    like,
    product_like,
    require,
    rows,
    width,
)
from tokenspeed_plan.plans.types import TensorSpec


def _topk(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    chosen = integer(attrs, "top_k")
    experts = width(specs, "logits")
    require(chosen <= experts, f"top {chosen} of {experts}")
    weights = like(specs, "logits", chosen)
    ids = TensorSpec.of(shape=weights.shape, dtype="i32")
    return {"weights": weights, "ids": ids}


def _expert_matrix(attrs: Attrs, specs: Specs) -> tuple[int, int]:
    """Rows and columns of the matrix `w` of one expert."""
    experts = integer(attrs, "num_experts")
    shape = specs["w"].shape
    found = list(shape)
    require(len(shape) == 3, f"`w` is {found}, not a matrix for each expert")
    held, out, inner = shape
    require(held == experts, f"`w` holds {held} experts, not {experts}")
    if not isinstance(out, int) or not isinstance(inner, int):
        raise ShapeError(f"`w` is {found}")
    if specs["w"].format.block:
        expect_stored(specs, "w", specs["w"].dtype)
    return out, inner


def _gate_up_matrix(attrs: Attrs, specs: Specs) -> int:
    """Columns of gate and up together, which read the whole of `x`."""
    out, hidden = _expert_matrix(attrs, specs)
    fits = width(specs, "x") == hidden
    require(fits, f"`w` has {hidden} columns, not those of `x`")
    require(out % 2 == 0, "gate and up halves differ")
    return out


def _experts_up(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    out = _gate_up_matrix(attrs, specs)
    chosen = width(specs, "ids")
    tokens = rows(specs, "x")
    expect(specs, "ids", tokens, chosen, dtype="i32")
    y = like(specs, "x", chosen * out // 2)
    return {"y": y}


def _experts_down(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    chosen = width(specs, "ids")
    hidden = _down_columns(attrs, specs, chosen)
    tokens = rows(specs, "h")
    expect(specs, "weights", tokens, chosen)
    return {"y": like(specs, "h", hidden)}


def _down_columns(attrs: Attrs, specs: Specs, chosen: int) -> int:
    """Columns that a down projection gives for one expert of `chosen` that a token has in `h`."""
    hidden, inner = _expert_matrix(attrs, specs)
    columns = width(specs, "h")
    fits = columns == chosen * inner
    require(fits, f"`w` has {inner} columns, `h` {columns} of {chosen} experts")
    return hidden


def _expert_sort(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    experts = integer(attrs, "num_experts")
    tokens = rows(specs, "ids")
    order = expect(specs, "ids", tokens, width(specs, "ids"), dtype="i32")
    bounds = TensorSpec.of(shape=(experts + 1,), dtype="i32")
    return {"order": order, "bounds": bounds}


def _expert_count(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    expect(specs, "ids", rows(specs, "ids"), width(specs, "ids"), dtype="i32")
    return {"counts": _counts(attrs)}


def _expert_place(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    found, wanted = specs["counts"], _counts(attrs)
    require(found == wanted, f"`counts` is {list(found.shape)}, its parts are {list(wanted.shape)}")
    return _expert_sort(attrs, specs)


def _counts(attrs: Attrs) -> TensorSpec:
    parts, experts = integer(attrs, "num_parts"), integer(attrs, "num_experts")
    return TensorSpec.of(shape=(parts, experts + 1), dtype="i32")


def _expect_order(attrs: Attrs, specs: Specs, x: str) -> int:
    """The tokens of `x` by expert; how many experts each token has."""
    experts = integer(attrs, "num_experts")
    tokens = rows(specs, x)
    chosen = width(specs, "order")
    expect(specs, "order", tokens, chosen, dtype="i32")
    expect(specs, "bounds", experts + 1, dtype="i32")
    return chosen


def _grouped_up(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    chosen = _expect_order(attrs, specs, "x")
    out = _gate_up_matrix(attrs, specs)
    y = product_like(attrs, specs, "x", chosen * out // 2)
    return {"y": y}


def _grouped_down(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    chosen = _expect_order(attrs, specs, "h")
    hidden = _down_columns(attrs, specs, chosen)
    y = product_like(attrs, specs, "h", chosen * hidden)
    return {"y": y}


def _expert_sum(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    d = specs["d"]
    tokens = rows(specs, "d")
    columns = width(specs, "d")
    chosen = width(specs, "weights")
    expect(specs, "weights", tokens, chosen, dtype=d.dtype)
    require(columns % chosen == 0, f"{columns} columns of {chosen} experts")
    y = like(specs, "d", columns // chosen)
    return {"y": y}


def _gated_add(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    x = specs["x"]
    require(specs["r"] == x, "operands differ")
    tokens = rows(specs, "x")
    expect(specs, "g", tokens, 1)
    return {"y": x}


MOE_OPS: dict[str, OpDef] = {
    "topk": OpDef(
        inputs=("logits",),
        outputs=("weights", "ids"),
        infer=_topk,
        doc="p = softmax(logits); ids = indices of the k largest; weights = p[ids] / sum(p[ids])",
        attrs=("top_k",),
    ),
    "experts_up": OpDef(
        inputs=("x", "ids"),
        outputs=("y",),
        infer=_experts_up,
        doc="y[t, j] = silu(x[t] G^T) * (x[t] U^T), G and U of expert ids[t, j]",
        weights=("w",),
        attrs=("num_experts",),
    ),
    "experts_down": OpDef(
        inputs=("h", "ids", "weights"),
        outputs=("y",),
        infer=_experts_down,
        doc="y[t] = sum_j weights[t, j] h[t, j] D^T, D of expert ids[t, j]",
        weights=("w",),
        attrs=("num_experts",),
    ),
    "expert_sort": OpDef(
        inputs=("ids",),
        outputs=("order", "bounds"),
        infer=_expert_sort,
        doc=(
            "order = flat indices into ids sorted by expert, those of other ranks last; bounds[e]"
            " = first index of expert e"
        ),
        attrs=("num_experts",),
    ),
    "expert_count": OpDef(
        inputs=("ids",),
        outputs=("counts",),
        infer=_expert_count,
        doc=(
            "counts[p, e] = how often the p-th part of the tokens chooses expert e; the last column"
            " counts experts of other ranks"
        ),
        attrs=("num_experts", "num_parts"),
    ),
    "expert_place": OpDef(
        inputs=("ids", "counts"),
        outputs=("order", "bounds"),
        infer=_expert_place,
        doc="expert_sort of ids that expert_count has counted",
        attrs=("num_experts", "num_parts"),
    ),
    "grouped_up": OpDef(
        inputs=("x", "order", "bounds"),
        outputs=("y",),
        infer=_grouped_up,
        doc="y = experts_up, as one product for each expert",
        weights=("w",),
        attrs=("num_experts",),
        optional=("dtype",),
    ),
    "grouped_down": OpDef(
        inputs=("h", "order", "bounds"),
        outputs=("y",),
        infer=_grouped_down,
        doc="y[t, j] = h[t, j] D^T, as one product for each expert",
        weights=("w",),
        attrs=("num_experts",),
        optional=("dtype",),
    ),
    "expert_sum": OpDef(
        inputs=("d", "weights"),
        outputs=("y",),
        infer=_expert_sum,
        doc="y[t] = sum_j weights[t, j] d[t, j]",
    ),
    "gated_add": OpDef(
        inputs=("x", "r", "g"),
        outputs=("y",),
        infer=_gated_add,
        doc="y = r + x * sigmoid(g), g one scalar for each token",
    ),
}
