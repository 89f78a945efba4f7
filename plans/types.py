"""The words that planner and runtime share: dtypes, formats, phases, dimensions, tensors."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

DType = Literal["fp64", "fp32", "bf16", "fp8", "fp4", "i64", "i32"]  # fp8 is e4m3, fp4 is e2m1
DTYPE_BITS: dict[DType, int] = {
    "fp64": 64,
    "fp32": 32,
    "bf16": 16,
    "fp8": 8,
    "fp4": 4,
    "i64": 64,
    "i32": 32,
}

ALIGNMENT_BYTES = 256  # of every buffer and weight in its arena

GIB = 1 << 30

Phase = Literal["prefill", "decode"]

RollbackWord = Literal["snapshot", "recompute"]  # how rejected drafts are taken back

WARP_SIZE = 32  # threads

SymbolicDim = Literal["num_tokens", "num_seqs", "num_seqs+1"]
Dim = int | SymbolicDim

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]  # empty until it is known
# A kernel's name is also that of its file, so it holds no path. It is empty until it is digested.
KernelName = Annotated[str, Field(pattern="^[a-z0-9_]*$")]

Constant = bool | int | float | str
Attr = Constant | tuple[int, ...]


def aligned(size_bytes: int) -> int:
    """`size_bytes` rounded up to the alignment of buffers."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class Frozen(BaseModel):
    """Base of everything in a plan: immutable, no unknown fields, no coercion, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Format(Frozen):
    """How elements are stored: their dtype, and for block-scaled ones the block and its scale.

    In JSON it is one word: `bf16`, or `fp8[128x128]:fp32` for blocks of 128 x 128 elements that
    share one fp32 scale, or `fp4[1x16]:fp8:fp32` where each row has one more factor.
    """

    dtype: DType
    block: tuple[Positive, ...] = ()
    scale: DType | None = None
    row_scale: DType | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        if not isinstance(data, str):
            return data
        found = _FORMAT.fullmatch(data)
        if found is None:
            raise ValueError(f"`{data}` is no format such as `bf16` or `fp8[128x128]:fp32`")
        for dtype in (found["dtype"], found["scale"], found["row_scale"]):
            if dtype is not None and dtype not in DTYPE_BITS:
                known = ", ".join(DTYPE_BITS)
                raise ValueError(f"`{data}` has the unknown dtype `{dtype}`; known are {known}")
        block: tuple[int, ...] = ()
        if found["block"] is not None:
            block = tuple(map(int, found["block"].split("x")))
        return {
            "dtype": found["dtype"],
            "block": block,
            "scale": found["scale"],
            "row_scale": found["row_scale"],
        }

    @model_validator(mode="after")
    def _both_or_none(self) -> Format:
        if bool(self.block) != (self.scale is not None):
            raise ValueError("a block and the dtype of its scale come together")
        if self.row_scale is not None and not self.block:
            raise ValueError("factors of rows come with blocks")
        return self

    @model_serializer
    def _spell(self) -> str:
        return str(self)

    def __str__(self) -> str:
        if not self.block:
            return self.dtype
        block = "x".join(map(str, self.block))
        word = f"{self.dtype}[{block}]:{self.scale}"
        if self.row_scale is not None:
            word += f":{self.row_scale}"
        return word

    @property
    def unit(self) -> tuple[int, ...]:
        """Elements of the last dimensions that are stored together: no rank cuts through them."""
        if self.dtype == "fp4" and self.block:
            return FP4_UNIT
        return self.block

    @property
    def bytes_per_element(self) -> float:
        """Of one element and its share of a block's scale; that of a row is not counted."""
        bits: float = DTYPE_BITS[self.dtype]
        if self.scale is not None:
            scale_bits = DTYPE_BITS[self.scale]
            bits += scale_bits / math.prod(self.block)
        return bits / 8


_FORMAT = re.compile(
    r"(?P<dtype>\w+)"
    r"(?:\[(?P<block>\d{1,6}(?:x\d{1,6})*)\]:(?P<scale>\w+)(?::(?P<row_scale>\w+))?)?"
)

# NVFP4 lies in memory in runs of 128 elements of a row (`runtime/execution/fp4_words.py`).
FP4_UNIT = (1, 128)

# The formats of published checkpoints, by the spec's word. FP8 has a scale for 128 x 128 elements,
# NVFP4 one for 16 elements of a row, and a factor for a matrix: for each row, since matrices with
# different factors are stacked.
FORMATS: dict[str, Format] = {
    "bf16": Format(dtype="bf16"),
    "fp32": Format(dtype="fp32"),
    "fp8": Format(dtype="fp8", block=(128, 128), scale="fp32"),
    "nvfp4": Format(dtype="fp4", block=(1, 16), scale="fp8", row_scale="fp32"),
}


@cache
def plain_format(dtype: DType) -> Format:
    """The format of elements without scales; made once, as a plan has thousands of tensors."""
    return Format(dtype=dtype)


class TensorSpec(Frozen):
    """A dense row-major tensor whose leading dimension may be symbolic."""

    shape: tuple[Dim, ...]
    format: Format

    @classmethod
    def of(cls, shape: tuple[Dim, ...], dtype: DType) -> TensorSpec:
        """A tensor of plain elements."""
        return cls(shape=shape, format=plain_format(dtype))

    @property
    def dtype(self) -> DType:
        """Of its elements."""
        return self.format.dtype

    def reshaped(self, shape: tuple[Dim, ...]) -> TensorSpec:
        """The same format in another shape."""
        return self.model_copy(update={"shape": shape})

    def bind(self, num_tokens: int, num_seqs: int) -> tuple[int, ...]:
        """The shape with the symbols replaced."""
        sizes = {
            "num_tokens": num_tokens,
            "num_seqs": num_seqs,
            "num_seqs+1": num_seqs + 1,
        }
        bound: list[int] = []
        for dim in self.shape:
            if isinstance(dim, str):
                bound.append(sizes[dim])
            else:
                bound.append(dim)
        return tuple(bound)

    def size_bytes(self, num_tokens: int = 0, num_seqs: int = 0) -> int:
        """Bytes at the given sizes, scales included."""
        shape = self.bind(num_tokens, num_seqs)
        size_bytes = math.ceil(math.prod(shape) * self.format.bytes_per_element)
        if self.format.row_scale is not None:
            size_bytes += math.prod(shape[:-1]) * DTYPE_BITS[self.format.row_scale] // 8
        return size_bytes


class RankShift(Frozen):
    """An offset that depends on the rank: `(rank // div) % mod * step`."""

    div: Positive
    mod: Positive
    step: Count

    def at(self, rank: int) -> int:
        """The offset on `rank`."""
        index = rank // self.div % self.mod
        return index * self.step
