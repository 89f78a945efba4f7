"""Embedding, norm, projections, and sums over ranks.

Letters: T tokens, S sequences, H hidden, V vocabulary, n inner columns. `x` and `r` are [T, H],
`table` is [V, H], the weight `w` of a product is [columns of y, columns of x].

Where `x` of a product is quantised, its constant `dtype` is that of y. Elements are then multiplied
as they are, in fp32, and each run of 128 columns is multiplied by its two factors.
"""

from __future__ import annotations

from tokenspeed_plan.plans.fp8_format import BLOCK, FP8_ROWS
from tokenspeed_plan.plans.ops.op_def import (
    Attrs,
    OpDef,
    ShapeError,
    Specs,
    check_norm_kind,
    expect,
    expect_stored,
    integer,
    like,
    product_like,
    require,
    width,
)
from tokenspeed_plan.plans.types import Dim, TensorSpec

_MAX_COLUMNS = 1 << 31  # kernels index columns with 32 bits


def _embed(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    shape = specs["token_ids"].shape
    dim: Dim = "num_tokens"
    if len(shape) == 2:
        dim = "num_seqs"
    expect(specs, "token_ids", dim, *shape[1:], dtype="i32")
    table = specs["table"]
    require(len(table.shape) == 2, "`table` is not a matrix")
    y = table.reshaped((dim, width(specs, "table")))
    return {"y": y}


def _rms_norm(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    check_norm_kind(attrs)
    columns = width(specs, "x")
    expect(specs, "w", columns)
    return {"y": like(specs, "x", columns)}


def _linear(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    splits = attrs["splits"]
    if not isinstance(splits, tuple) or not splits:
        raise ShapeError(f"splits {splits!r}")
    for size in splits:
        require(0 < size < _MAX_COLUMNS, f"splits {splits!r}")
    inner = width(specs, "x")
    expect(specs, "w", sum(splits), inner)
    expect_stored(specs, "w", specs["x"].dtype)
    outputs = {}
    for index, size in enumerate(splits):
        outputs[f"y{index}"] = product_like(attrs, specs, "x", size)
    return outputs


def _quantise(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    x = specs["x"]
    require(not x.format.block, "`x` is quantised already")
    require(width(specs, "x") % BLOCK == 0, f"`x` is not whole runs of {BLOCK} columns")
    return {"q": TensorSpec(shape=x.shape, format=FP8_ROWS)}


def _add(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    require(specs["x"] == specs["r"], "operands differ")
    return {"y": specs["x"]}


def _silu_mul(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    columns = width(specs, "x")
    require(columns % 2 == 0, "gate and up halves differ")
    y = like(specs, "x", columns // 2)
    return {"y": y}


def _all_reduce(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    num_ranks = integer(attrs, "num_ranks")
    require(num_ranks > 1, "one rank has no peers")
    return {"y": specs["x"]}


def _concat(attrs: Attrs, specs: Specs) -> dict[str, TensorSpec]:
    require(specs["x"] == specs["r"], "operands differ")
    columns = 2 * width(specs, "x")
    return {"y": like(specs, "x", columns)}


DENSE_OPS: dict[str, OpDef] = {
    # Where `token_ids` is a matrix [S, drafts], the last column is embedded: the latest draft.
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
        optional=("dtype",),
    ),
    "quantise": OpDef(
        inputs=("x",),
        outputs=("q",),
        infer=_quantise,
        doc=(
            f"q = x / s rounded to e4m3, s = amax / 448 of each row and {BLOCK} columns; q has its"
            " elements, then s"
        ),
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
