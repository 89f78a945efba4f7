"""The weights of one rank, assembled from the tensors of a checkpoint as the plan says.

The files are safetensors: they are memory-mapped, and nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.schema import Piece, Plan, WeightSpec
from tokenspeed_plan.plans.weight_files import add_tensors, weight_files
from tokenspeed_plan.runtime.execution.arenas import Arenas
from tokenspeed_plan.runtime.loading.staging import Staging

_FLOATS = ("BF16", "F16", "F32", "F64")
_HINT = "name the checkpoint that the plan was made for with `--weights DIR`"
_VECTOR_STD = 0.1  # of random norm weights and biases

Box = tuple[slice, ...]


class Checkpoint:
    """The tensors of a model's folder, by name.

    Args:
        folder: of the model.
        stack: closes them.

    Raises:
        PlanError: there are no weights, or a file of them is damaged.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._slices: dict[str, Any] = {}
        for file in weight_files(folder):
            add_tensors(self._slices, file, _open(file.path, stack))
        if not self._slices:
            raise PlanError(f"there are no weights in `{folder}`", _HINT)

    def find(self, name: str, box: Box) -> Any:
        """The tensor that contains `box`; indexing it reads the file.

        Raises:
            PlanError: it is missing, smaller than the box, or of a dtype that cannot be read.
        """
        if name not in self._slices:
            raise PlanError(f"`{self.folder}` has no tensor `{name}`", _HINT)
        tensor = self._slices[name]
        shape = tuple(tensor.get_shape())
        if not _contains(shape, box):
            used = [part.stop for part in box]
            raise PlanError(f"`{name}` is {list(shape)}, the plan reads up to {used}", _HINT)
        dtype = tensor.get_dtype()
        if dtype not in _FLOATS:
            raise PlanError(f"`{name}` is stored as {dtype}, which this plan cannot read", _HINT)
        return tensor


def _open(path: Path, stack: ExitStack) -> dict[str, Any]:
    """The tensors of a file, not read yet."""
    try:
        file = stack.enter_context(safe_open(path, "pt"))
    except (SafetensorError, OSError) as error:
        raise PlanError(f"`{path}` is not a safetensors file: {error}", _HINT) from error
    return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118


def _contains(shape: tuple[int, ...], box: Box) -> bool:
    """Whether a box lies within a tensor of that shape."""
    if len(shape) != len(box):
        return False
    return all(part.stop <= size for size, part in zip(shape, box, strict=True))


def load_weights(
    plan: Plan, folder: Path, arenas_of: Callable[[], Arenas], rank: int = 0
) -> tuple[Arenas, dict[str, Tensor]]:
    """Check all names, shapes and dtypes, then allocate and fill.

    Args:
        plan: has the weights and their sources.
        folder: the checkpoint.
        arenas_of: allocates the arenas; called only after every check has passed.
        rank: whose weights.

    Returns:
        The arenas, and the weights in them by name.

    Raises:
        PlanError: the checkpoint does not fit the plan.
    """
    with ExitStack() as stack:
        checkpoint = Checkpoint(folder, stack)
        for weight in plan.pool.weights:
            _check(weight, checkpoint, rank)
        arenas = arenas_of()
        staging = Staging(plan.target.device)
        tensors: dict[str, Tensor] = {}
        for weight in plan.pool.weights:
            view = _view(weight, arenas)
            for piece in weight.pieces:
                _copy(piece, view, checkpoint, rank, staging)
            tensors[weight.name] = view
        staging.finish()
        return arenas, tensors


def random_weights(plan: Plan, arenas: Arenas, seed: int = 0) -> dict[str, Tensor]:
    """Random weights, for benchmarks and tests.

    They are normal; matrices are scaled by 1 / sqrt(columns), so that activations keep their size.
    """
    random = torch.Generator(plan.target.device).manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for weight in plan.pool.weights:
        view = _view(weight, arenas)
        std = _VECTOR_STD
        if view.dim() > 1:
            std = view.shape[-1] ** -0.5
        tensors[weight.name] = view.normal_(std=std, generator=random)
    return tensors


def _check(weight: WeightSpec, checkpoint: Checkpoint, rank: int) -> None:
    for piece in weight.pieces:
        for name, box in _boxes(piece, rank):
            checkpoint.find(name, box)


def _view(weight: WeightSpec, arenas: Arenas) -> Tensor:
    """The weight's place in the arenas."""
    shape = weight.tensor.bind(0, 0)
    return arenas.view("weights", weight.offset_bytes, shape, weight.tensor.dtype)


def _copy(
    piece: Piece, weight: Tensor, checkpoint: Checkpoint, rank: int, staging: Staging
) -> None:
    """Copy a piece to its place in the weight; one of experts has a checkpoint tensor for each."""
    place = _box(piece.at, piece.size)
    target = weight[place]
    parts: Sequence[Tensor] = (target,)
    if "{expert}" in piece.source:
        parts = target.unbind(0)
    for (name, box), part in zip(_boxes(piece, rank), parts, strict=True):
        source = checkpoint.find(name, box)
        staging.copy(part, source[box])


def _box(starts: Iterable[int], sizes: Iterable[int]) -> Box:
    """One slice for each dimension."""
    parts = []
    for start, size in zip(starts, sizes, strict=True):
        part = slice(start, start + size)
        parts.append(part)
    return tuple(parts)


def _boxes(piece: Piece, rank: int) -> Iterator[tuple[str, Box]]:
    """The checkpoint tensors that a piece reads on a rank, and the box of each."""
    starts = list(piece.start)
    for shift in piece.shifts:
        starts[shift.dim] += shift.by.at(rank)
    box = _box(starts, piece.size)
    if "{expert}" not in piece.source:
        yield piece.source, box
        return
    experts = box[0]
    for expert in range(experts.start, experts.stop):
        name = piece.source.replace("{expert}", str(expert))
        yield name, box[1:]
