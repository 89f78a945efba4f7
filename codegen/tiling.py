"""What a tiling rule sees of a kernel, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from tokenspeed_plan.codegen.tuned import Tile, find_tile
from tokenspeed_plan.plans.encodings import NVFP4
from tokenspeed_plan.plans.fp8_format import BLOCK, E4M3_MAX, FP8, FP8_ROWS, MIN_AMAX
from tokenspeed_plan.plans.ops import integer, number, query_len
from tokenspeed_plan.plans.schema import GridDim, KernelSpec, Part
from tokenspeed_plan.plans.types import WARP_SIZE, Constant, DType, TensorSpec

FOLD_ROWS = 64  # of a tile, from which on the factors of FP8 blocks are multiplied into the weight
RUN = 16  # elements of FP8 that a thread loads at once
WARP_RUNS = RUN * WARP_SIZE  # elements of a row that a warp loads at once
GEMV_ROWS = 2  # with so few rows of x, plain arithmetic keeps up with the memory
GEMV_COLUMNS = 1024  # columns of a router: with few rows of x too few for the tensor cores
NORMED_ROWS = 32  # rows of x up to which the product of a router includes its norm
MOST_ROWS = 8192  # of which a tile was measured: with more there are more tiles, none better


class Machine(Protocol):
    """What a tiling rule asks of the target."""

    @property
    def sm(self) -> int:
        """Compute capability: 90 for an H200, 0 for a CPU."""

    @property
    def num_sms(self) -> int:
        """Streaming multiprocessors; 0 where programs are interpreted one after the other."""


@dataclass(frozen=True, slots=True)
class Work:
    """A kernel to tile.

    Attributes:
        kind: what it is called.
        kernel: its parts and parameters.
        num_tokens: tokens of its program, at most.
        num_seqs: sequences of its program, at most.
        hardware: the target.
        forced: the only tile to try, or None.
    """

    kind: str
    kernel: KernelSpec
    num_tokens: int
    num_seqs: int
    hardware: Machine
    forced: Tile | None = None

    def tiles(self, *heuristic: Tile) -> list[Tile]:
        """The tiles to try, best first: the forced one alone, or a measured one and the others."""
        if self.forced:
            return [self.forced]
        measured = find_tile(self.hardware.sm, self.key)
        if measured:
            return [measured, *heuristic]
        return list(heuristic)

    @property
    def key(self) -> str:
        """What a measured tile is filed under in `tuned.yaml`.

        The kind, rows rounded up to a power of two, queries of a sequence where there are several,
        and the shapes of the weight matrices, with their dtype where they are quantised; last,
        whether activations are, too, and whether recurrent state is in bf16. More rows than
        `MOST_ROWS` make more tiles, and no other ones better.
        """
        words = [self.kind, str(min(up2(self.num_rows), MOST_ROWS))]
        if self.query_len > 1:
            words.append(f"by {self.query_len}")
        for param in self.kernel.params:
            shape = param.tensor.shape
            if param.role == "weight" and len(shape) > 1:
                word = "x".join(map(str, shape))
                words.append(word)
                if param.tensor.format.block:
                    words.append(param.tensor.dtype)
        if self.quantised:
            words.append("times fp8")
        if self.stores_bf16_state:
            words.append("bf16 state")
        return " ".join(words)

    @property
    def stores_bf16_state(self) -> bool:
        """Whether it reads or writes a recurrent state that is stored in bf16."""
        states = [param for param in self.kernel.params if param.name.endswith("ssm_state")]
        return any(param.tensor.dtype == "bf16" for param in states)

    @property
    def query_len(self) -> int:
        """Queries of each sequence in a decode step, where the kernel must know; else 1."""
        lengths = [query_len(part.attrs) for part in self.kernel.parts]
        return max(lengths, default=1)

    @property
    def plain_norm(self) -> bool:
        """Whether its norm, if it has one, multiplies by w, not by 1 + w."""
        for part in self.kernel.parts:
            if part.kind in ("rms_norm", "head_norm") and part.attrs.get("plain"):
                return True
        return False

    @property
    def by_seqs(self) -> bool:
        """Whether its outputs have a row for each sequence, not for each token."""
        for param in self.kernel.params:
            if param.role == "output" and param.tensor.shape[0] == "num_seqs":
                return True
        return False

    @property
    def num_rows(self) -> int:
        """Rows of its outputs, at most."""
        if self.by_seqs:
            return self.num_seqs
        return self.num_tokens

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Parameters by name."""
        return {param.name: param.tensor for param in self.kernel.params}

    @property
    def outputs(self) -> tuple[str, ...]:
        """Parameters that it writes and that are not state."""
        outputs = [param for param in self.kernel.params if param.role == "output"]
        return tuple(param.name for param in outputs)

    @property
    def interpreted(self) -> bool:
        """Whether programs are interpreted one after the other, so that few large ones are best."""
        return self.hardware.num_sms == 0

    @property
    def dtype(self) -> DType:
        """Of the activations and weights; states may be stored in less."""
        for param in self.kernel.params:
            if param.role != "state" and param.tensor.dtype in ("bf16", "fp64"):
                return param.tensor.dtype
        return "fp32"

    @property
    def precision(self) -> str:
        """Of products of fp32 operands: exact in an fp32 plan, TF32 beside bf16 activations."""
        if self.dtype == "fp32":
            return "ieee"
        return "tf32"

    def is_fp8(self, name: str) -> bool:
        """Whether a weight is in blocks of FP8."""
        return self.specs[name].format == FP8

    def is_fp4(self, name: str) -> bool:
        """Whether a weight is in NVFP4."""
        return self.specs[name].format == NVFP4

    @property
    def quantised(self) -> bool:
        """Whether it multiplies quantised activations."""
        return any(p.role == "input" and p.tensor.format == FP8_ROWS for p in self.kernel.params)

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

    Attributes:
        template: the name of its template.
        constants: values that the text bakes in, by upper-case name.
        grid: its programs.
        num_warps: warps of a program.
        num_stages: loads in flight at once.
        options: what the template chooses by.
        scratch: buffers through which its programs exchange results, by name.
        prefetches: whether it loads weights while the kernel before it still runs.
        prefetch: inputs that it loads then, too; an older kernel wrote them, and is done because
            the kernel before this one has `trigger_after_wait`.
        trigger_after_wait: let the next kernel start only when those before this one are done.
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


TRITON_DTYPES: dict[DType, str] = {"bf16": "tl.bfloat16", "fp32": "tl.float32"}


def per_seq(width: int, dtype: DType = "fp32") -> TensorSpec:
    """Scratch of `width` elements a sequence."""
    return TensorSpec.of(shape=("num_seqs", width), dtype=dtype)


def per_token(width: int, dtype: DType = "fp32") -> TensorSpec:
    """Scratch of `width` elements a token."""
    return TensorSpec.of(shape=("num_tokens", width), dtype=dtype)


def dst_slots(work: Work, name: str) -> dict[str, Constant]:
    """State slots that a sequence may write to, where the input `name` has several of each."""
    if len(work.specs[name].shape) == 2:
        return {"DST_SLOTS": work.width(name)}
    return {}


def id_columns(work: Work, name: str) -> int:
    """Columns of token ids, the last of which counts; 1 where they are a list."""
    if len(work.specs[name].shape) == 2:
        return work.width(name)
    return 1


def quantising(work: Work) -> dict[str, Constant]:
    """Constants of a kernel that leaves activations in FP8, none where it does not."""
    if not work.has("quantise"):
        return {}
    return {"BLOCK": BLOCK, "E4M3_MAX": E4M3_MAX, "MIN_AMAX": MIN_AMAX}


def run_warps(depth: int) -> tuple[int, int]:
    """A depth of tiles of FP8 in plain arithmetic, and warps: each thread has a run of a row.

    So activations need no exchange among threads. The tile's depth divides the whole one.
    """
    tile = min(depth & -depth, 2 * WARP_RUNS)
    return tile, max(tile // WARP_RUNS, 1)


def in_whole_blocks(tile: Tile, depth: int) -> Tile:
    """A tile of the tensor cores with rows of one block of FP8, and whole blocks of the depth.

    Where the weight takes the factor, it is one block.
    """
    deepest = BLOCK
    if tile.m < FOLD_ROWS and depth % tile.k == 0:
        deepest = tile.k
    return replace(tile, n=min(tile.n, BLOCK), k=min(tile.k, deepest))


def up2(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    below = max(value - 1, 0)
    return 1 << below.bit_length()


def down2(value: int) -> int:
    """The largest power of two that is not above `value`, at least 1."""
    num_bits = max(value, 1).bit_length()
    return 1 << (num_bits - 1)


def fixed(count: int) -> GridDim:
    """Always `count` programs."""
    return GridDim(fixed=count)


def per_rows(block: int, by_seqs: bool = False) -> GridDim:
    """A program for each `block` tokens, or for each sequence."""
    if by_seqs:
        return GridDim(per_seq=1)
    return GridDim(block=block)


def blocks(size: int, block: int) -> int:
    """ceil(size / block)."""
    return -(-size // block)
