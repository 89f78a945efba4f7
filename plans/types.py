"""The words that planner and runtime share: dtypes, phases, symbolic dimensions, tensors."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

DType = Literal["fp64", "fp32", "bf16", "i64", "i32"]
DTYPE_BYTES: dict[DType, int] = {"fp64": 8, "fp32": 4, "bf16": 2, "i64": 8, "i32": 4}

Phase = Literal["prefill", "decode"]

SymbolicDim = Literal["num_tokens", "num_seqs", "num_seqs+1"]
Dim = int | SymbolicDim

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]  # empty until it is known
KernelName = Annotated[str, Field(pattern="^[a-z0-9_]*$")]  # of a file, so no path; empty until it is digested

Attr = bool | int | float | str


class Frozen(BaseModel):
    """Base of everything in a plan: immutable, no unknown fields, no coercion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TensorSpec(Frozen):
    """A dense row-major tensor whose leading dimension may be symbolic."""

    shape: tuple[Dim, ...]
    dtype: DType

    def bind(self, num_tokens: int, num_seqs: int) -> tuple[int, ...]:
        """The shape with the symbols replaced."""
        sizes = {"num_tokens": num_tokens, "num_seqs": num_seqs, "num_seqs+1": num_seqs + 1}
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.shape)

    def size_bytes(self, num_tokens: int = 0, num_seqs: int = 0) -> int:
        """Bytes at the given sizes."""
        return math.prod(self.bind(num_tokens, num_seqs)) * DTYPE_BYTES[self.dtype]


class RankShift(Frozen):
    """An offset that depends on the rank: `(rank // div) % mod * step`."""

    div: Positive
    mod: Positive
    step: Count

    def at(self, rank: int) -> int:
        """The offset on `rank`."""
        return rank // self.div % self.mod * self.step
