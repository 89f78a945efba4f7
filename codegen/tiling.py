"""What a tiling rule sees of a kernel, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from tokenspeed_plan.codegen.tuned import Tile, find_tile
from tokenspeed_plan.plans.ops import integer, number, query_len
from tokenspeed_plan.plans.schema import GridDim, KernelSpec, Part
from tokenspeed_plan.plans.types import Constant, DType, TensorSpec

L2_EPS = 1e-6
GEMV_ROWS = 2  # up to here plain arithmetic keeps up with the memory, so products are computed so
GEMV_COLUMNS = 1024  # of a router: too few for tiles of the tensor cores, with few rows


class Machine(Protocol):
    """What a tiling rule asks of the target: compute capability (0: a CPU) and streaming multiprocessors."""

    @property
    def sm(self) -> int:
        """Compute capability, 90 for an H200."""

    @property
    def num_sms(self) -> int:
        """Streaming multiprocessors, 0 where programs are interpreted one after the other."""


@dataclass(frozen=True, slots=True)
class Work:
    """A kernel to tile: its parts, its tensors, and how many rows its program has at most."""

    kind: str
    kernel: KernelSpec
    num_tokens: int
    num_seqs: int
    hardware: Machine
    forced: Tile | None = None

    def tiles(self, *heuristic: Tile) -> list[Tile]:
        """The tiles to try, best first: a forced one alone, else a measured one, then those of the rule."""
        if self.forced:
            return [self.forced]
        measured = find_tile(self.hardware.sm, self.key)
        return [measured, *heuristic] if measured else list(heuristic)

    @property
    def key(self) -> str:
        """What a measured tile is filed under: the kind, rows rounded up to a power of two, and the weights' shapes.

        Where several rows of a sequence are one program's, their number too.
        """
        matrices = [
            p.tensor.shape
            for p in self.kernel.params
            if p.role == "weight" and len(p.tensor.shape) > 1
        ]
        shapes = " ".join("x".join(map(str, shape)) for shape in matrices)
        rows = f"{up2(self.num_rows)}" + (f" by {self.query_len}" if self.query_len > 1 else "")
        return f"{self.kind} {rows} {shapes}".strip()

    @property
    def query_len(self) -> int:
        """Rows of a sequence in a decode step, where the kernel must know."""
        return max((query_len(part.attrs) for part in self.kernel.parts), default=1)

    @property
    def by_seqs(self) -> bool:
        """Whether what it makes has a row a sequence, not a row a token."""
        return any(
            p.role == "output" and p.tensor.shape[0] == "num_seqs" for p in self.kernel.params
        )

    @property
    def num_rows(self) -> int:
        """Rows of what it makes, at most."""
        return self.num_seqs if self.by_seqs else self.num_tokens

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Parameters by name."""
        return {param.name: param.tensor for param in self.kernel.params}

    @property
    def outputs(self) -> tuple[str, ...]:
        """Parameters that it writes and that are not state."""
        return tuple(param.name for param in self.kernel.params if param.role == "output")

    @property
    def interpreted(self) -> bool:
        """Whether programs run one after the other, so that a few large ones are best."""
        return self.hardware.num_sms == 0

    @property
    def dtype(self) -> DType:
        """Of the activations and weights."""
        floats = [spec.dtype for spec in self.specs.values() if spec.dtype in ("bf16", "fp64")]
        return floats[0] if floats else "fp32"

    @property
    def precision(self) -> str:
        """How products of fp32 operands are taken: exactly in an fp32 plan, in TF32 beside bf16 activations."""
        return "ieee" if self.dtype == "fp32" else "tf32"

    def has(self, kind: str) -> bool:
        """Whether it holds such a part."""
        return any(part.kind == kind for part in self.kernel.parts)

    def part(self, kind: str) -> Part:
        """The first part of a kind."""
        return next(part for part in self.kernel.parts if part.kind == kind)

    def size(self, kind: str, name: str) -> int:
        """An integer constant of a part."""
        return integer(self.part(kind).attrs, name)

    def number(self, kind: str, name: str) -> float:
        """A constant of a part."""
        return number(self.part(kind).attrs, name)

    def width(self, name: str, dim: int = -1) -> int:
        """A fixed dimension of a parameter."""
        size = self.specs[name].shape[dim]
        assert isinstance(size, int)
        return size


@dataclass(frozen=True, slots=True)
class Tiling:
    """One way to build a kernel.

    `options` choose inside the template; programs meet in `scratch`; with `ahead` the kernel loads
    what no other writes while its predecessor ends, and the inputs `early`: its predecessor has
    `trigger_after_wait`, and does not make them.
    """

    template: str
    constants: Mapping[str, Constant]
    grid: tuple[GridDim, ...]
    num_warps: int = 4
    num_stages: int = 2
    options: Mapping[str, object] = field(default_factory=dict)
    scratch: Mapping[str, TensorSpec] = field(default_factory=dict)
    prefetches: bool = False
    prefetch: tuple[str, ...] = ()
    trigger_after_wait: bool = False


def per_seq(width: int, dtype: DType = "fp32") -> TensorSpec:
    """Scratch of so many elements a sequence."""
    return TensorSpec.of(shape=("num_seqs", width), dtype=dtype)


def per_token(width: int, dtype: DType = "fp32") -> TensorSpec:
    """Scratch of so many elements a token."""
    return TensorSpec.of(shape=("num_tokens", width), dtype=dtype)


TRITON_DTYPES: dict[DType, str] = {"bf16": "tl.bfloat16", "fp32": "tl.float32"}


def rows_table(work: Work, rows: str) -> dict[str, Constant]:
    """Columns of the rows to write where each sequence has several: what leaves one state leaves it in the first."""
    return {"TABLE": work.width(rows)} if len(work.specs[rows].shape) == 2 else {}


def up2(value: int) -> int:
    """The power of two from `value` up."""
    return 1 << max(value - 1, 0).bit_length()


def down2(value: int) -> int:
    """The power of two from `value` down, at least 1."""
    return 1 << (max(value, 1).bit_length() - 1)


def fixed(count: int) -> GridDim:
    """So many programs, always."""
    return GridDim(fixed=count)


def per_rows(block: int, by_seqs: bool = False) -> GridDim:
    """A program for each `block` tokens, or for each sequence."""
    return GridDim(per_seq=1) if by_seqs else GridDim(block=block)


def blocks(size: int, block: int) -> int:
    """ceil(size / block)."""
    return -(-size // block)
