"""Arenas: one allocation each, tensors are views at planned offsets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.schema import ArenaSpec
from tokenspeed_plan.plans.types import DTYPE_BITS, DType

TORCH_DTYPES: dict[DType, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "i64": torch.int64,
    "i32": torch.int32,
}


def _zeros(spec: ArenaSpec, device: str) -> Tensor:
    try:
        return torch.zeros(spec.size_bytes, dtype=torch.uint8, device=device)
    # PyTorch has no error class of its own for a lack of memory on a CPU.
    except (RuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        raise PlanError(
            f"cannot allocate {spec.size_bytes} bytes for `{spec.name}` on this machine's "
            f"{device}: {reason}",
            "end other processes, or plan for less: lower `workload.concurrency`",
        ) from error


class Arenas:
    """The memory of one rank. It starts as zeros; state slot 0 must be zero, and stays so.

    Args:
        specs: names and sizes.
        device: `cuda` is the current GPU.
        given: arenas that are allocated already.
        paths: of arenas in shared memory, a file by which other processes map them.

    Raises:
        PlanError: there is not as much as the plan needs.
    """

    def __init__(
        self,
        specs: Iterable[ArenaSpec],
        device: str = "cpu",
        given: Mapping[str, Tensor] | None = None,
        paths: Mapping[str, str] | None = None,
    ) -> None:
        self._bytes = dict(given or {})
        self.paths = dict(paths or {})
        for spec in specs:
            if spec.name not in self._bytes:
                self._bytes[spec.name] = _zeros(spec, device)

    def whole(self, arena: str) -> Tensor:
        """All bytes of an arena, u8."""
        return self._bytes[arena]

    def view(self, arena: str, offset_bytes: int, shape: tuple[int, ...], dtype: DType) -> Tensor:
        """A tensor at a planned place; nothing is copied."""
        size_bytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
        return (
            self._bytes[arena][offset_bytes : offset_bytes + size_bytes]
            .view(TORCH_DTYPES[dtype])
            .view(shape)
        )

    def poison(self, arena: str) -> None:
        """Fill an arena with NaN, so that a read of what was not written shows."""
        self._bytes[arena].fill_(0xFF)
