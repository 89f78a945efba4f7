"""Kernels: their parameters, parts, launch and binaries."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from tokenspeed_plan.plans.ops import Access
from tokenspeed_plan.plans.types import (
    Attr,
    Constant,
    Count,
    Frozen,
    KernelName,
    Positive,
    RankShift,
    Sha256,
    TensorSpec,
)

TensorRole = Literal["input", "weight", "state", "output", "scratch", "symmetric"]
LaunchRole = Literal["rank_constant", "peer_table", "rank", "program", "num_tokens", "num_seqs"]
TENSOR_ROLES: frozenset[str] = frozenset(get_args(TensorRole))


class Param(Frozen):
    """One argument of a kernel's launch.

    A tensor has the role `input`, `weight`, `state`, `output`, `scratch` or `symmetric`. Scratch is
    memory that the programs of one launch share: it is zero before the first launch, and no result.
    What is symmetric lies at the same place on all ranks, is zero at first, and peers write it.

    The other roles are what the launcher fills in:

        rank_constant  i32     a constant that depends on the rank, such as its first expert
        peer_table     i64[R]  for each of R ranks the address of its arena `symmetric`
        rank           i32     the rank that runs the kernel
        program        i32     the place of the program among those of its pool
        num_tokens     i32     of the batch
        num_seqs       i32     of the batch

    Scalars have the shape `()` and are passed by value, all else is passed by address.
    """

    name: str
    role: TensorRole | LaunchRole
    tensor: TensorSpec
    access: Access = "read"

    @property
    def is_tensor(self) -> bool:
        """Whether a call names a buffer or a weight for it."""
        return self.role in TENSOR_ROLES


class Part(Frozen):
    """One operator inside a kernel. Names are parameters of the kernel, or values inside it."""

    kind: str
    operands: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: dict[str, Attr]
    rank_attrs: dict[str, RankShift] = Field(default_factory=dict)


class GridDim(Frozen):
    """Programs of a launch along one dimension of the grid.

    They are `fixed + ceil(num_tokens * scale / block) + num_seqs * per_seq`; without a `block` the
    second term is 0.
    """

    fixed: Count = 0
    scale: Positive = 1
    block: Count = 0
    per_seq: Count = 0

    def at(self, num_tokens: int, num_seqs: int) -> int:
        """The number at the sizes of a batch."""
        programs = self.fixed + num_seqs * self.per_seq
        if self.block:
            units = num_tokens * self.scale
            programs += -(-units // self.block)
        return programs


class Launch(Frozen):
    """How a kernel is built and started: its template, the constants baked into it, its grid.

    `source_sha256` is that of `kernels/<name>.py`. With `pdl` (programmatic dependent launch) the
    kernel starts while its predecessor ends, and waits for its results inside. It reads the inputs
    in `prefetch` before that wait: they must be older than its predecessor, which must have
    `trigger_after_wait` (it lets its successor start only after its own wait).
    """

    template: str
    constants: dict[str, Constant]
    grid: Annotated[tuple[GridDim, ...], Field(min_length=1, max_length=3)]
    num_warps: Annotated[int, Field(ge=1, le=32)]
    num_stages: Annotated[int, Field(ge=1, le=32)]
    pdl: bool
    prefetch: tuple[str, ...] = ()
    trigger_after_wait: bool = False
    source_sha256: Sha256


class KernelSpec(Frozen):
    """One specialised kernel, shared by all steps that need it. Its name ends with its digest.

    `params` are all arguments of a launch, in the order of the ABI: the tensors first, then what
    the launcher fills in. A kernel without `launch` has no Triton body and only tensors: fp64,
    which only the reference computes in.
    """

    name: KernelName
    params: tuple[Param, ...]
    parts: tuple[Part, ...]
    launch: Launch | None = None

    @property
    def tensors(self) -> tuple[Param, ...]:
        """The parameters that a call names buffers and weights for."""
        tensors = [param for param in self.params if param.is_tensor]
        return tuple(tensors)

    @property
    def launch_params(self) -> tuple[Param, ...]:
        """The parameters that the launcher fills in."""
        others = [param for param in self.params if not param.is_tensor]
        return tuple(others)

    @property
    def reduced_operand(self) -> str | None:
        """The parameter that the kernel adds up over all ranks, if any."""
        for part in self.parts:
            if part.kind == "all_reduce":
                return part.operands[0]
        return None


class Binary(Frozen):
    """A kernel compiled for one architecture, in the file `cubin/<kernel>.sm<sm>.cubin`."""

    kernel: KernelName
    sm: Positive
    cubin_sha256: Sha256
    registers: Count
    spill_bytes: Count
    shared_bytes: Count
