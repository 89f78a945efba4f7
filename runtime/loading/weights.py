"""The weights of one rank, assembled from the tensors of a checkpoint as the plan says.

The files are safetensors: they are memory-mapped, and nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.fp8_format import BLOCK, STORED_FP8, STORED_SCALES, scale_name
from tokenspeed_plan.plans.schema import Piece, Plan, Shift, WeightSpec
from tokenspeed_plan.plans.weight_files import add_tensors, weight_files
from tokenspeed_plan.runtime.execution.arenas import Arenas
from tokenspeed_plan.runtime.execution.fp8_blocks import Scaled, parts_of, quantise_blocks
from tokenspeed_plan.runtime.loading.staging import Staging

_FLOATS = ("BF16", "F16", "F32", "F64")
_FP8 = (STORED_FP8,)
_HINT = "name the checkpoint that the plan was made for with `--weights DIR`"
_VECTOR_STD = 0.1  # of random norm weights and biases
_ROUNDED_ROWS = 32 * BLOCK  # of a matrix at a time
_FP8_STD = 64.0  # of random elements; the largest of a few million stays below 448

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

    def find(self, name: str, box: Box, dtypes: Sequence[str] = _FLOATS) -> Any:
        """The tensor that contains `box` in one of these dtypes; indexing it reads the file.

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
        if dtype not in dtypes:
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
            stored = _view(weight, arenas)
            tensors[weight.name] = stored
            if weight.rounds:
                _round(weight, parts_of(stored, weight.tensor), checkpoint, rank)
                continue
            for target in _targets(weight, stored):
                for piece in weight.pieces:
                    _copy(piece, target, checkpoint, rank, staging)
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
        if weight.tensor.format.block:
            _fill_blocks(parts_of(view, weight.tensor), random)
            tensors[weight.name] = view
            continue
        std = _VECTOR_STD
        if view.dim() > 1:
            std = view.shape[-1] ** -0.5
        tensors[weight.name] = view.normal_(std=std, generator=random)
    return tensors


def _fill_blocks(parts: Scaled, random: torch.Generator) -> None:
    """Normal elements of a few dozen, a matrix at a time; the factors make up for it."""
    elements = parts.elements
    for matrix in elements.view(-1, *elements.shape[-2:]):
        values = torch.empty(matrix.shape, device=matrix.device)
        matrix.copy_(values.normal_(std=_FP8_STD, generator=random))
    parts.scales.fill_(elements.shape[-1] ** -0.5 / _FP8_STD)


@dataclass(frozen=True, slots=True)
class _Target:
    """Where pieces of a checkpoint go: the elements of a weight, or the factors of its blocks.

    Attributes:
        tensor: that is filled.
        dtypes: of the checkpoint's tensors.
        block: elements of a side of a block where it takes factors; else 1.
    """

    tensor: Tensor
    dtypes: Sequence[str]
    block: int = 1

    def piece(self, piece: Piece) -> Piece:
        """The piece of the tensor that is read, in its own elements."""
        if self.block == 1:
            return piece
        first = len(piece.size) - 2
        shifts = tuple(_in_blocks(shift, first) for shift in piece.shifts)
        changes = {
            "source": scale_name(piece.source),
            "start": _cut(piece.start, first),
            "size": _cut(piece.size, first),
            "at": _cut(piece.at, first),
            "shifts": shifts,
        }
        return piece.model_copy(update=changes)


def _cut(numbers: Sequence[int], first: int) -> tuple[int, ...]:
    """Counts of elements in each dimension as counts of blocks, from dimension `first` on."""
    cut = [number // BLOCK for number in numbers[first:]]
    return (*numbers[:first], *cut)


def _in_blocks(shift: Shift, first: int) -> Shift:
    if shift.dim < first:
        return shift
    by = shift.by.model_copy(update={"step": shift.by.step // BLOCK})
    return shift.model_copy(update={"by": by})


def _targets(weight: WeightSpec, stored: Tensor) -> list[_Target]:
    """What of a weight is filled from the checkpoint."""
    if not weight.tensor.format.block:
        return [_Target(stored, _FLOATS)]
    elements, scales = parts_of(stored, weight.tensor)
    return [_Target(elements, _FP8), _Target(scales, STORED_SCALES, BLOCK)]


def _round(weight: WeightSpec, parts: Scaled, checkpoint: Checkpoint, rank: int) -> None:
    """Round plain elements to nearest, some rows of blocks at a time."""
    for piece in weight.pieces:
        first, *_ = piece.at
        for name, (rows, columns) in _boxes(piece, rank):
            source = checkpoint.find(name, (rows, columns))
            for at in range(rows.start, rows.stop, _ROUNDED_ROWS):
                chunk = source[at : min(at + _ROUNDED_ROWS, rows.stop), columns]
                made = quantise_blocks(chunk.to(parts.elements.device))
                row = first + at - rows.start
                parts.elements[row : row + len(chunk)] = made.elements
                parts.scales[row // BLOCK : row // BLOCK + len(made.scales)] = made.scales


def _check(weight: WeightSpec, checkpoint: Checkpoint, rank: int) -> None:
    if weight.rounds:
        for piece in weight.pieces:
            for name, box in _boxes(piece, rank):
                checkpoint.find(name, box)
        return
    nothing = torch.empty(weight.tensor.size_bytes(), dtype=torch.float8_e4m3fn, device="meta")
    for target in _targets(weight, nothing):
        for piece in weight.pieces:
            for name, box in _boxes(target.piece(piece), rank):
                checkpoint.find(name, box, target.dtypes)


def _view(weight: WeightSpec, arenas: Arenas) -> Tensor:
    """The weight's place in the arenas; one in blocks is a flat run of all its bytes."""
    shape = weight.tensor.bind(0, 0)
    if weight.tensor.format.block:
        shape = (weight.tensor.size_bytes(),)
    return arenas.view("weights", weight.offset_bytes, shape, weight.tensor.dtype)


def _copy(
    piece: Piece, target: _Target, checkpoint: Checkpoint, rank: int, staging: Staging
) -> None:
    """Copy a piece to its place in the weight; one of experts has a checkpoint tensor for each."""
    piece = target.piece(piece)
    place = target.tensor[_box(piece.at, piece.size)]
    parts: Sequence[Tensor] = (place,)
    if "{expert}" in piece.source:
        parts = place.unbind(0)
    for (name, box), part in zip(_boxes(piece, rank), parts, strict=True):
        source = checkpoint.find(name, box, target.dtypes)
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
