"""Embedding, norm, projections, and sums over ranks."""

from __future__ import annotations

from tokenspeed_plan.plans.ops.op_def import (
    Attrs,
    OpDef,
    ShapeError,
    Specs,
    check_norm_kind,
    expect,
    integer,
    like,
    require,
    width,
)
from tokenspeed_plan.plans.types import Dim, TensorSpec


def _embed(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    shape = specs["token_ids"].shape
    dim: Dim = "num_tokens"
    if len(shape) == 2:
        dim = "num_seqs"
    expect(specs, "token_ids", dim, *shape[1:], dtype="i32")
    require(len(specs["table"].shape) == 2, "`table` is not a matrix")
    return {"y": TensorSpec.of(shape=(dim, width(specs, "table")), dtype=specs["table"].dtype)}


def _rms_norm(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    check_norm_kind(attrs)
    expect(specs, "w", width(specs, "x"))
    return {"y": like(specs, "x", width(specs, "x"))}


def _linear(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    splits = attrs["splits"]
    if not isinstance(splits, tuple) or not splits:
        raise ShapeError(f"splits {splits!r}")
    require(all(0 < size < 1 << 31 for size in splits), f"splits {splits!r}")
    expect(specs, "w", sum(splits), width(specs, "x"), dtype=specs["x"].dtype)
    return {f"y{i}": like(specs, "x", part) for i, part in enumerate(splits)}


def _add(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    require(specs["x"] == specs["r"], "operands differ")
    return {"y": specs["x"]}


def _silu_mul(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    require(width(specs, "x") % 2 == 0, "gate and up halves differ")
    return {"y": like(specs, "x", width(specs, "x") // 2)}


def _all_reduce(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    require(integer(attrs, "num_ranks") > 1, "one rank has no peers")
    return {"y": specs["x"]}


def _concat(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    require(specs["x"] == specs["r"], "operands differ")
    return {"y": like(specs, "x", 2 * width(specs, "x"))}


DENSE_OPS: dict[str, OpDef] = {
    # Of a matrix of ids with a row for each sequence, the last column counts: the latest draft.
    "embed": OpDef(
        inputs=("token_ids",),
        outputs=("y",),
        infer=_embed,
        doc="y = table[token_ids]; a token that another rank holds gives 0",
        weights=("table",),
    ),
    "rms_norm": OpDef(
        inputs=("x",),
        outputs=("y",),
        infer=_rms_norm,
        doc="y = x / sqrt(mean(x^2) + eps) * (1 + w)",
        weights=("w",),
        attrs=("eps",),
        optional=("plain",),
    ),
    "linear": OpDef(
        inputs=("x",),
        outputs=("y0",),
        infer=_linear,
        doc="y = x w^T, split into columns of the sizes `splits`",
        weights=("w",),
        attrs=("splits",),
    ),
    "add": OpDef(
        inputs=("x", "r"),
        outputs=("y",),
        infer=_add,
        doc="y = x + r",
    ),
    "silu_mul": OpDef(
        inputs=("x",),
        outputs=("y",),
        infer=_silu_mul,
        doc="y = silu(x[:, :n]) * x[:, n:]",
    ),
    "concat": OpDef(
        inputs=("x", "r"),
        outputs=("y",),
        infer=_concat,
        doc="y = [x | r]",
    ),
    "all_reduce": OpDef(
        inputs=("x",),
        outputs=("y",),
        infer=_all_reduce,
        doc="y = sum of x over the ranks",
        attrs=("num_ranks",),
    ),
}
