"""A row of the table of operators, and the checks that its shape rules are made of.

Shape rules name operands as the formulas of their operators do. A symbolic dimension is
`num_tokens`, `num_seqs` or `num_seqs+1`; all others are numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from tokenspeed_plan.plans.types import Attr, Dim, DType, TensorSpec

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
        infer: the output specs, from constants and inputs; raises `ShapeError`.
        doc: the formula.
        weights: parameters that it reads.
        states: persistent buffers that outlive the step, with the access.
        attrs: names of its constants.
        optional: names of constants that may be left out.
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
        states = tuple(name for name, _ in self.states)
        return self.inputs + self.weights + states


def require(condition: bool, message: str) -> None:
    """Check a condition on shapes.

    Raises:
        ShapeError: it does not hold.
    """
    if not condition:
        raise ShapeError(message)


def integer(attrs: Attrs, name: str) -> int:
    """The positive integer constant `name`.

    Raises:
        ShapeError: it is something else.
    """
    value = attrs.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ShapeError(f"constant `{name}` is {value!r}, not a positive integer")
    return value


def number(attrs: Attrs, name: str) -> float:
    """The positive finite constant `name`.

    Raises:
        ShapeError: it is something else.
    """
    value = attrs.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ShapeError(f"constant `{name}` is {value!r}, not a positive number")
    return float(value)


def check_numbers(attrs: Attrs) -> None:
    """The constants that no shape depends on.

    Raises:
        ShapeError: one is not a positive number.
    """
    for name in ("eps", "theta", "factor"):
        if name in attrs:
            number(attrs, name)


def check_norm_kind(attrs: Attrs) -> None:
    """`plain`, where it is given, is true: the norm multiplies by w, not by 1 + w.

    Raises:
        ShapeError: it is something else.
    """
    plain = attrs.get("plain", True)
    require(plain is True, f"plain is {plain!r}, not true")


def expect(specs: Specs, name: str, *shape: Dim, dtype: DType | None = None) -> TensorSpec:
    """The operand `name`, which must have this shape and, where given, this dtype.

    Raises:
        ShapeError: it has another.
    """
    spec = specs[name]
    found = list(spec.shape)
    needed = list(shape)
    require(found == needed, f"`{name}` is {found} where {needed} is needed")
    if dtype is not None:
        fits = spec.dtype == dtype
        require(fits, f"`{name}` is {spec.dtype} where {dtype} is needed")
    return spec


def expect_stored(specs: Specs, name: str, dtype: DType) -> None:
    """The matrix `name` must have this dtype, or blocks of scaled elements.

    Raises:
        ShapeError: it has another dtype, or a block that is not whole.
    """
    spec = specs[name]
    if not spec.format.block:
        require(spec.dtype == dtype, f"`{name}` is {spec.dtype} where {dtype} is needed")
        return
    for dim, block in zip(spec.shape[-2:], spec.format.unit[-2:], strict=True):
        whole = isinstance(dim, int) and dim % block == 0
        require(whole, f"`{name}` is {list(spec.shape)}, not whole blocks of {spec.format}")


def expect_vectors(specs: Specs, names: Iterable[str], dim: Dim, dtype: DType) -> None:
    """Several operands that must be vectors of this length and dtype.

    Raises:
        ShapeError: one is something else.
    """
    for name in names:
        expect(specs, name, dim, dtype=dtype)


def width(specs: Specs, name: str) -> int:
    """The last dimension of `name`, an integer.

    Raises:
        ShapeError: it is symbolic, or `name` is a scalar.
    """
    for dim in specs[name].shape[-1:]:
        if isinstance(dim, int):
            return dim
    raise ShapeError(f"`{name}` has no fixed last dimension")


def rows(specs: Specs, name: str) -> Dim:
    """The leading dimension of the matrix `name`.

    Raises:
        ShapeError: it is no matrix.
    """
    shape = specs[name].shape
    is_matrix = len(shape) == 2
    require(is_matrix, f"`{name}` is {list(shape)}, not a matrix")
    return shape[0]


def batch_rows(specs: Specs, name: str) -> Dim:
    """The leading dimension of a matrix: `num_tokens`, or `num_seqs` at one token a sequence.

    Raises:
        ShapeError: it is something else.
    """
    dim = rows(specs, name)
    require(dim in ("num_tokens", "num_seqs"), f"`{name}` has {dim} rows")
    return dim


def like(specs: Specs, name: str, last: int) -> TensorSpec:
    """A matrix with the rows and the dtype of `name`, and `last` columns."""
    shape = (rows(specs, name), last)
    return specs[name].reshaped(shape)


def product_like(attrs: Attrs, specs: Specs, name: str, last: int) -> TensorSpec:
    """The result of a product with `name`: `like`, in the constant `dtype` where it is quantised.

    Raises:
        ShapeError: `name` is quantised and there is no `dtype`, or the other way round, or the
            weight `w` is not quantised.
    """
    x = specs[name]
    quantised = bool(x.format.block)
    require(quantised == ("dtype" in attrs), f"`dtype` belongs to a quantised `{name}`")
    if not quantised:
        return like(specs, name, last)
    require(bool(specs["w"].format.block), f"`{name}` is quantised and `w` is not")
    return TensorSpec.of(shape=(rows(specs, name), last), dtype=dtype_attr(attrs))


def wide(dtype: DType) -> DType:
    """The accumulation dtype: fp32, or fp64 where the plan computes in fp64."""
    if dtype == "fp64":
        return "fp64"
    return "fp32"


def dtype_attr(attrs: Attrs) -> DType:
    """The constant `dtype`: what an operator that computes in the accumulation dtype gives back.

    Raises:
        ShapeError: it is no floating-point dtype.
    """
    value = attrs.get("dtype")
    known: tuple[DType, ...] = ("fp64", "fp32", "bf16")
    for dtype in known:
        if value == dtype:
            return dtype
    raise ShapeError(f"dtype {value!r}")


def query_len(attrs: Attrs) -> int:
    """Queries of each sequence in a decode step: 1 where the constant is left out.

    Raises:
        ShapeError: it is not a positive integer.
    """
    if "query_len" not in attrs:
        return 1
    return integer(attrs, "query_len")
