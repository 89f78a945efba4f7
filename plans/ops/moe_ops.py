"""Routed experts: choice, products one token or one expert at a time, and the sum."""

from __future__ import annotations

from tokenspeed_plan.plans.ops.op_def import (
    Attrs,
    OpDef,
    ShapeError,
    Specs,
    expect,
    integer,
    like,
    require,
    rows,
    width,
)
from tokenspeed_plan.plans.types import TensorSpec


def _topk(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    chosen = integer(attrs, "top_k")
    require(0 < chosen <= width(specs, "logits"), f"top {chosen} of {width(specs, 'logits')}")
    ids = TensorSpec.of(shape=(rows(specs, "logits"), chosen), dtype="i32")
    return {"weights": like(specs, "logits", chosen), "ids": ids}


def _expert_matrix(attrs: Attrs, specs: Specs) -> tuple[int, int]:
    """Rows and columns of the matrix `w` of one expert."""
    shape = specs["w"].shape
    experts = integer(attrs, "num_experts")
    require(len(shape) == 3, f"`w` is {list(shape)}, not a matrix for each expert")
    held, out, inner = shape
    require(held == experts, f"`w` holds {held} experts, not {experts}")
    if not isinstance(out, int) or not isinstance(inner, int):
        raise ShapeError(f"`w` is {list(shape)}")
    return out, inner


def _gate_up_matrix(attrs: Attrs, specs: Specs) -> int:
    """Columns of gate and up together, which read the whole of `x`."""
    out, hidden = _expert_matrix(attrs, specs)
    require(hidden == width(specs, "x"), f"`w` has {hidden} columns, not those of `x`")
    require(out % 2 == 0, "gate and up halves differ")
    return out


def _experts_up(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    out = _gate_up_matrix(attrs, specs)
    chosen = width(specs, "ids")
    expect(specs, "ids", rows(specs, "x"), chosen, dtype="i32")
    return {"y": like(specs, "x", chosen * out // 2)}


def _experts_down(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    hidden, inner = _expert_matrix(attrs, specs)
    chosen = width(specs, "ids")
    require(width(specs, "h") == chosen * inner, f"`w` is {list(specs['w'].shape)}")
    expect(specs, "weights", rows(specs, "h"), chosen)
    return {"y": like(specs, "h", hidden)}


def _expert_sort(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    ids = expect(specs, "ids", rows(specs, "ids"), width(specs, "ids"), dtype="i32")
    return {
        "order": ids,
        "bounds": TensorSpec.of(shape=(integer(attrs, "num_experts") + 1,), dtype="i32"),
    }


def _expect_order(attrs: Attrs, specs: Specs, x: str) -> int:
    """The tokens of `x` by expert; how many experts each token has."""
    chosen = width(specs, "order")
    expect(specs, "order", rows(specs, x), chosen, dtype="i32")
    expect(specs, "bounds", integer(attrs, "num_experts") + 1, dtype="i32")
    return chosen


def _grouped_up(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    chosen = _expect_order(attrs, specs, "x")
    return {"y": like(specs, "x", chosen * _gate_up_matrix(attrs, specs) // 2)}


def _grouped_down(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    chosen = _expect_order(attrs, specs, "h")
    hidden, inner = _expert_matrix(attrs, specs)
    require(width(specs, "h") == chosen * inner, f"`w` is {list(specs['w'].shape)}")
    return {"y": like(specs, "h", chosen * hidden)}


def _expert_sum(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    chosen = width(specs, "weights")
    expect(specs, "weights", rows(specs, "d"), chosen, dtype=specs["d"].dtype)
    require(width(specs, "d") % chosen == 0, f"{width(specs, 'd')} columns of {chosen} experts")
    return {"y": like(specs, "d", width(specs, "d") // chosen)}


def _gated_add(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    require(specs["x"] == specs["r"], "operands differ")
    expect(specs, "g", rows(specs, "x"), 1)
    return {"y": specs["x"]}


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
    "grouped_up": OpDef(
        inputs=("x", "order", "bounds"),
        outputs=("y",),
        infer=_grouped_up,
        doc="y = experts_up, as one product for each expert",
        weights=("w",),
        attrs=("num_experts",),
    ),
    "grouped_down": OpDef(
        inputs=("h", "order", "bounds"),
        outputs=("y",),
        infer=_grouped_down,
        doc="y[t, j] = h[t, j] D^T, as one product for each expert",
        weights=("w",),
        attrs=("num_experts",),
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
