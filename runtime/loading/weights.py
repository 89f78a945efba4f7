"""Checkpoint tensors -> the weights of one rank, as the plan's pieces say. Files are memory-mapped, never unpickled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.schema import Piece, Plan, WeightSpec
from tokenspeed_plan.runtime.execution.arenas import Arenas
from tokenspeed_plan.runtime.loading.staging import Staging

_FLOATS = ("BF16", "F16", "F32", "F64")
_HINT = "name the checkpoint that the plan was made for with `--weights DIR`"


class Checkpoint:
    """The tensors of a folder, by name."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._slices: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                file = stack.enter_context(safe_open(path, "pt"))
            except (SafetensorError, OSError) as error:
                raise PlanError(f"`{path}` is not a safetensors file: {error}", _HINT) from error
            self._slices |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        if not self._slices:
            raise PlanError(f"there are no weights in `{folder}`", _HINT)

    def find(self, name: str, used: tuple[int, ...]) -> Any:
        """The tensor, which must be at least as large as the part of it that is used.

        Raises:
            PlanError: missing, of another shape, or in a dtype that cannot be read.
        """
        if name not in self._slices:
            raise PlanError(f"`{self.folder}` has no tensor `{name}`", _HINT)
        tensor = self._slices[name]
        shape = tuple(tensor.get_shape())
        if len(shape) != len(used) or any(
            have < need for have, need in zip(shape, used, strict=True)
        ):
            raise PlanError(f"`{name}` is {list(shape)}, the plan reads up to {list(used)}", _HINT)
        if tensor.get_dtype() not in _FLOATS:
            raise PlanError(
                f"`{name}` is stored as {tensor.get_dtype()}, which this plan cannot read", _HINT
            )
        return tensor


def load_weights(
    plan: Plan, folder: Path, arenas_of: Any, rank: int = 0
) -> tuple[Arenas, dict[str, Tensor]]:
    """Check all names, shapes and dtypes, then allocate and fill.

    Args:
        plan: what to load.
        folder: where the checkpoint lies.
        arenas_of: makes the arenas; called only after every check has passed.
        rank: whose part.

    Raises:
        PlanError: the checkpoint is not the plan's.
    """
    with ExitStack() as stack:
        checkpoint = Checkpoint(folder, stack)
        for weight in plan.pool.weights:
            for piece in weight.pieces:
                for name, box in _boxes(piece, rank):
                    checkpoint.find(name, tuple(part.stop for part in box))
        arenas: Arenas = arenas_of()
        staging = Staging(plan.target.device)
        made = {
            weight.name: _assemble(weight, checkpoint, arenas, rank, staging)
            for weight in plan.pool.weights
        }
        staging.finish()
        return arenas, made


def random_weights(plan: Plan, arenas: Arenas, seed: int = 0) -> dict[str, Tensor]:
    """Weights for measuring: normal, matrices scaled so that activations keep their size."""
    random = torch.Generator(plan.target.device).manual_seed(seed)
    made = {}
    for weight in plan.pool.weights:
        shape = weight.tensor.bind(0, 0)
        view = arenas.view("weights", weight.offset_bytes, shape, weight.tensor.dtype)
        made[weight.name] = view.normal_(
            std=shape[-1] ** -0.5 if len(shape) > 1 else 0.1, generator=random
        )
    return made


def _assemble(
    weight: WeightSpec, checkpoint: Checkpoint, arenas: Arenas, rank: int, staging: Staging
) -> Tensor:
    shape = weight.tensor.bind(0, 0)
    view = arenas.view("weights", weight.offset_bytes, shape, weight.tensor.dtype)
    for piece in weight.pieces:
        target = view[
            tuple(slice(at, at + size) for at, size in zip(piece.at, piece.size, strict=True))
        ]
        parts = target.unbind(0) if "{expert}" in piece.source else (target,)
        for (name, box), part in zip(_boxes(piece, rank), parts, strict=True):
            staging.copy(part, checkpoint.find(name, tuple(side.stop for side in box))[box])
    return view


def _boxes(piece: Piece, rank: int) -> Iterator[tuple[str, tuple[slice, ...]]]:
    """The tensors that a piece reads on a rank, and the box of each."""
    starts = list(piece.start)
    for shift in piece.shifts:
        starts[shift.dim] += shift.by.at(rank)
    box = tuple(slice(start, start + size) for start, size in zip(starts, piece.size, strict=True))
    if "{expert}" not in piece.source:
        yield piece.source, box
        return
    for expert in range(box[0].start, box[0].stop):
        yield piece.source.replace("{expert}", str(expert)), box[1:]
