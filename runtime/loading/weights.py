"""The weights of one rank, assembled from the tensors of a checkpoint as the plan says.

The files are safetensors: they are memory-mapped, and nothing is unpickled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenspeed_plan.plans.encodings import NVFP4
from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.fp8_format import BLOCK
from tokenspeed_plan.plans.schema import Piece, Plan, WeightSpec
from tokenspeed_plan.plans.types import DType
from tokenspeed_plan.plans.weight_files import add_tensors, weight_files
from tokenspeed_plan.runtime.execution import fp4_words, fp8_blocks
from tokenspeed_plan.runtime.execution.arenas import TORCH_DTYPES, Arenas
from tokenspeed_plan.runtime.execution.block_scaled import flat
from tokenspeed_plan.runtime.execution.fp4_words import Fp4
from tokenspeed_plan.runtime.loading.encoded import FLOATS, Filling, fillings, finish
from tokenspeed_plan.runtime.loading.loading_report import Report, nobody
from tokenspeed_plan.runtime.loading.staging import Staging

_HINT = "name the checkpoint that the plan was made for with `--weights DIR`"
_VECTOR_STD = 0.1  # of random norm weights and biases
_LARGEST_E4M3 = 0x7E  # positive and no NaN
_ROUNDED_ROWS = 32 * BLOCK  # of a matrix at a time
_FP4_STD = 2.93  # root mean square of the sixteen e2m1
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

    def find(self, name: str, box: Box, dtypes: Sequence[str] = FLOATS) -> Any:
        """The tensor that contains `box` in one of these dtypes; indexing it reads the file.

        Raises:
            PlanError: it is missing, smaller than the box, or of a dtype that cannot be read.
        """
        if name not in self._slices:
            raise PlanError(f"`{self.folder}` has no tensor `{name}`", _HINT)
        tensor = self._slices[name]
        shape = tuple(tensor.get_shape())
        is_number = not box and math.prod(shape) == 1
        if not is_number and not _contains(shape, box):
            used = [part.stop for part in box]
            raise PlanError(f"`{name}` is {list(shape)}, the plan reads up to {used}", _HINT)
        dtype = tensor.get_dtype()
        if dtype not in dtypes:
            raise PlanError(f"`{name}` is stored as {dtype}, which this plan cannot read", _HINT)
        return tensor

    def number(self, name: str, dtypes: Sequence[str]) -> float:
        """The only number of a tensor, which scales a matrix.

        Raises:
            PlanError: it is missing, of another dtype, not one number, or not positive and finite.
        """
        tensor = self.find(name, (), dtypes)[...]
        value = float(tensor.flatten()[0])
        if not 0.0 < value < math.inf:
            raise PlanError(f"`{name}` is {value}, a scale is positive and finite", _HINT)
        return value


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
    plan: Plan,
    folder: Path,
    arenas_of: Callable[[], Arenas],
    rank: int = 0,
    report: Report = nobody,
) -> tuple[Arenas, dict[str, Tensor]]:
    """Check all names, shapes and dtypes, then allocate and fill.

    Args:
        plan: has the weights and their sources.
        folder: the checkpoint.
        arenas_of: allocates the arenas; called only after every check has passed.
        rank: whose weights.
        report: is told how far it is.

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
        for done, weight in enumerate(plan.pool.weights):
            report("loading weights", done, len(plan.pool.weights))
            stored = _view(weight, arenas)
            tensors[weight.name] = stored
            if weight.rounds:
                _round(weight, fp8_blocks.parts_of(stored, weight.tensor), checkpoint, rank)
                continue
            for piece in weight.pieces:
                for filling in fillings(weight, piece, stored):
                    _fill(filling, checkpoint, rank, staging)
            finish(weight, stored)
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
        if weight.tensor.format == NVFP4:
            _fill_fp4(fp4_words.parts_of(view, weight.tensor), random)
            tensors[weight.name] = view
            continue
        if weight.tensor.format.block:
            _fill_blocks(fp8_blocks.parts_of(view, weight.tensor), random)
            tensors[weight.name] = view
            continue
        std = _VECTOR_STD
        if view.dim() > 1:
            std = view.shape[-1] ** -0.5
        tensors[weight.name] = view.normal_(std=std, generator=random)
    return tensors


def _fill_fp4(parts: Fp4, random: torch.Generator) -> None:
    """Any bits are elements, of a root mean square of 2.9; the factors make up for it."""
    for matrix in parts.elements.view(-1, *parts.elements.shape[-2:]):
        matrix.random_(generator=random)
    parts.scales.fill_(1.0)
    columns = 2 * parts.elements.shape[-1]
    parts.factors.fill_(columns**-0.5 / _FP4_STD)


def _fill_blocks(parts: fp8_blocks.Scaled, random: torch.Generator) -> None:
    """Normal elements of a few dozen, a matrix at a time; the factors make up for it."""
    elements = parts.elements
    for matrix in elements.view(-1, *elements.shape[-2:]):
        values = torch.empty(matrix.shape, device=matrix.device)
        matrix.copy_(values.normal_(std=_FP8_STD, generator=random))
    parts.scales.fill_(elements.shape[-1] ** -0.5 / _FP8_STD)


def _round(weight: WeightSpec, parts: fp8_blocks.Scaled, checkpoint: Checkpoint, rank: int) -> None:
    """Round plain elements to nearest, some rows of blocks at a time."""
    for piece in weight.pieces:
        first, *_ = piece.at
        for name, (rows, columns) in _boxes(piece, rank):
            source = checkpoint.find(name, (rows, columns))
            for at in range(rows.start, rows.stop, _ROUNDED_ROWS):
                chunk = source[at : min(at + _ROUNDED_ROWS, rows.stop), columns]
                made = fp8_blocks.quantise_blocks(chunk.to(parts.elements.device))
                row = first + at - rows.start
                parts.elements[row : row + len(chunk)] = made.elements
                parts.scales[row // BLOCK : row // BLOCK + len(made.scales)] = made.scales


def _check(weight: WeightSpec, checkpoint: Checkpoint, rank: int) -> None:
    if weight.rounds:
        for piece in weight.pieces:
            for name, box in _boxes(piece, rank):
                checkpoint.find(name, box)
        return
    shape, dtype = _place(weight)
    nothing = torch.empty(shape, dtype=TORCH_DTYPES[dtype], device="meta")
    for piece in weight.pieces:
        for filling in fillings(weight, piece, nothing):
            for name, box in _boxes(filling.piece, rank):
                if filling.is_number:
                    checkpoint.number(name, filling.dtypes)
                else:
                    checkpoint.find(name, box, filling.dtypes)


def _place(weight: WeightSpec) -> tuple[tuple[int, ...], DType]:
    """Shape and dtype of a weight in its arena; a block-scaled one is a flat run."""
    if weight.tensor.format.block:
        count, dtype = flat(weight.tensor)
        return (count,), dtype
    return weight.tensor.bind(0, 0), weight.tensor.dtype


def _view(weight: WeightSpec, arenas: Arenas) -> Tensor:
    shape, dtype = _place(weight)
    return arenas.view("weights", weight.offset_bytes, shape, dtype)


def _fill(filling: Filling, checkpoint: Checkpoint, rank: int, staging: Staging) -> None:
    """Fill a piece's place; one of experts has a checkpoint tensor for each.

    Raises:
        PlanError: a scale of NVFP4 is negative or NaN.
    """
    piece = filling.piece
    place = filling.tensor[_box(piece.at, piece.size)]
    parts: Sequence[Tensor] = (place,)
    if "{expert}" in piece.source:
        parts = place.unbind(0)
    for (name, box), part in zip(_boxes(piece, rank), parts, strict=True):
        if filling.is_number:
            number = checkpoint.number(name, filling.dtypes)
            part.fill_(1.0 / number if filling.divides else number)
            continue
        values = checkpoint.find(name, box, filling.dtypes)[box]
        if filling.is_scale and (values.view(torch.uint8) > _LARGEST_E4M3).any():
            raise PlanError(f"`{name}` has a scale that is negative or no number", _HINT)
        staging.copy(part, values)


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
