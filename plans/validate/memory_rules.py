"""Arenas: everything lies inside its own, nothing overlaps, and the memory map adds up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import get_args

from tokenspeed_plan.plans.schema import (
    ArenaName,
    BufferSpec,
    Limits,
    Memory,
    Plan,
    Pool,
    Program,
    shared_bytes,
)
from tokenspeed_plan.plans.types import ALIGNMENT_BYTES, Dim
from tokenspeed_plan.plans.validate.refusal import refuse

_SHARED_ARENAS = ("kv_cache", "state", "io", "scratch", "symmetric")
_PROGRAM_ARENAS = ("activations", "symmetric")


@dataclass(frozen=True, slots=True)
class _Span:
    """Bytes of an arena that one tensor holds."""

    name: str
    arena: ArenaName
    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


def check_memory(plan: Plan, pool: Pool) -> None:
    """Every buffer and weight has bytes of its own in its arena, and the arenas fit a rank.

    Buffers of one program may share bytes; `hazards` checks that they do so one after the other.

    Raises:
        PlanError: naming the tensor or the arena.
    """
    _check_map(pool)
    sizes: dict[str, int] = {arena.name: arena.size_bytes for arena in pool.arenas}
    if plan.target.count == 1 and sizes.get("symmetric"):
        raise refuse(f"{sizes['symmetric']} symmetric bytes for one rank, which has no peers")
    for program in pool.programs:
        for span in _program_spans(program):
            _check_inside(span, sizes)
    spans = [*_shared_spans(pool), *_weight_spans(pool)]
    for span in spans:
        _check_inside(span, sizes)
    _check_disjoint(spans)
    _check_symmetric(pool)
    for buffer in pool.buffers:
        _check_shape(buffer, pool.limits)


def _program_spans(program: Program) -> Iterator[_Span]:
    for buffer in program.buffers:
        if buffer.arena not in _PROGRAM_ARENAS:
            raise refuse(f"`{buffer.name}` of {program.name} is in `{buffer.arena}`")
        size = buffer.tensor.size_bytes(program.max_tokens, program.max_seqs)
        yield _Span(buffer.name, buffer.arena, buffer.offset_bytes, size)


def _shared_spans(pool: Pool) -> Iterator[_Span]:
    tensors = {buffer.name: buffer.tensor for buffer in pool.buffers}
    sizes = shared_bytes(tensors, pool.programs)
    for buffer in pool.buffers:
        if buffer.arena not in _SHARED_ARENAS:
            raise refuse(f"`{buffer.name}` is in `{buffer.arena}`")
        if sizes[buffer.name] <= 0:
            raise refuse(f"no program touches `{buffer.name}`")
        yield _Span(buffer.name, buffer.arena, buffer.offset_bytes, sizes[buffer.name])


def _weight_spans(pool: Pool) -> Iterator[_Span]:
    for weight in pool.weights:
        yield _Span(weight.name, "weights", weight.offset_bytes, weight.tensor.size_bytes())


def _check_inside(span: _Span, sizes: Mapping[str, int]) -> None:
    if span.arena not in sizes:
        raise refuse(f"there is no arena `{span.arena}`")
    if span.start < 0 or span.end > sizes[span.arena]:
        raise refuse(f"`{span.name}` leaves its arena")
    if span.start % ALIGNMENT_BYTES != 0:
        raise refuse(f"`{span.name}` starts at {span.start}, not aligned")


def _check_disjoint(spans: list[_Span]) -> None:
    ordered = sorted(spans, key=lambda span: (span.arena, span.start, span.end))
    for one, other in pairwise(ordered):
        if one.arena == other.arena and one.end > other.start:
            raise refuse(f"`{one.name}` and `{other.name}` overlap")


def _check_symmetric(pool: Pool) -> None:
    """Programs place their symmetric buffers after those that all of them share.

    Peers address both at any time, so that a program's buffer may not lie on the flags.
    """
    shared = [span for span in _shared_spans(pool) if span.arena == "symmetric"]
    for program in pool.programs:
        for span in _program_spans(program):
            if span.arena == "symmetric":
                _check_apart(span, shared)


def _check_apart(span: _Span, others: list[_Span]) -> None:
    for other in others:
        if span.start < other.end and other.start < span.end:
            raise refuse(f"`{span.name}` and `{other.name}` overlap")


def _check_shape(buffer: BufferSpec, limits: Limits) -> None:
    """Pages, state slots and page tables must be as many and as large as the limits say."""
    shape = buffer.tensor.shape
    wanted: tuple[Dim, ...] = shape
    if buffer.arena == "kv_cache":
        wanted = (limits.num_pages + 1, 2, limits.page_size, *shape[3:])
    elif buffer.arena == "state":
        wanted = (limits.num_state_slots, *shape[1:])
    elif buffer.name == "page_table":
        wanted = (*shape[:-1], limits.table_pages)
    if shape != wanted:
        raise refuse(f"`{buffer.name}` is {list(shape)}, the limits say {list(wanted)}")


def _check_map(pool: Pool) -> None:
    """The memory map counts each arena, and no more than a rank has."""
    memory = pool.memory_bytes_per_rank
    sizes: dict[str, int] = {arena.name: arena.size_bytes for arena in pool.arenas}
    counted = memory.model_dump()
    for name in get_args(ArenaName):
        size = sizes.get(name, 0)
        if counted[name] != size:
            raise refuse(f"arena `{name}` is {size} bytes, not {counted[name]}")
    _check_total(memory)


def _check_total(memory: Memory) -> None:
    parts = memory.model_dump(exclude={"total", "capacity"}).values()
    if min(parts) < 0 or sum(parts) != memory.total:
        raise refuse("the memory map does not add up")
    if memory.total > memory.capacity:
        raise refuse(f"needs {memory.total} bytes, a rank has {memory.capacity}")
