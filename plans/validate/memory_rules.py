"""Arenas: everything lies inside its own, nothing overlaps, and the memory map adds up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import get_args

from tokenspeed_plan.plans.schema import (
    ArenaName,
    BufferSpec,
    LibraryCall,
    Limits,
    Memory,
    Plan,
    Pool,
    Program,
    shared_bytes,
)
from tokenspeed_plan.plans.types import ALIGNMENT_BYTES
from tokenspeed_plan.plans.validate.refusal import refuse

_SHARED_ARENAS = ("kv_cache", "state", "io", "scratch", "symmetric")


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
    sizes = _arena_bytes(pool)
    symmetric = sizes.get("symmetric", 0)
    if symmetric and plan.target.count == 1:
        raise refuse(f"{symmetric} symmetric bytes for one rank, which has no peers")
    for program in pool.programs:
        for span in _program_spans(program):
            _check_inside(span, sizes)
    spans = [*_shared_spans(pool), *_weight_spans(pool)]
    for span in spans:
        _check_inside(span, sizes)
    _check_disjoint(spans)
    for buffer in pool.buffers:
        _check_shape(buffer, pool.limits)


def _program_spans(program: Program) -> Iterator[_Span]:
    for buffer in program.buffers:
        arena = buffer.arena
        if arena != "activations":
            raise refuse(f"`{buffer.name}` of {program.name} is in `{arena}`")
        size = buffer.tensor.size_bytes(program.max_tokens, program.max_seqs)
        yield _buffer_span(buffer, size)


def _buffer_span(buffer: BufferSpec, size: int) -> _Span:
    return _Span(
        buffer.name,
        buffer.arena,
        buffer.offset_bytes,
        size,
    )


def _shared_spans(pool: Pool) -> Iterator[_Span]:
    tensors = {buffer.name: buffer.tensor for buffer in pool.buffers}
    sizes = shared_bytes(tensors, pool.programs)
    for buffer in pool.buffers:
        size = sizes[buffer.name]
        if buffer.arena not in _SHARED_ARENAS:
            raise refuse(f"`{buffer.name}` is in `{buffer.arena}`")
        if size <= 0:
            raise refuse(f"no program touches `{buffer.name}`")
        yield _buffer_span(buffer, size)


def _weight_spans(pool: Pool) -> Iterator[_Span]:
    for weight in pool.weights:
        size = weight.tensor.size_bytes()
        yield _Span(weight.name, "weights", weight.offset_bytes, size)


def _check_inside(span: _Span, sizes: Mapping[str, int]) -> None:
    start = span.start
    arena_bytes = sizes.get(span.arena)
    if arena_bytes is None:
        raise refuse(f"there is no arena `{span.arena}`")
    if start < 0 or span.end > arena_bytes:
        raise refuse(f"`{span.name}` leaves its arena")
    if start % ALIGNMENT_BYTES != 0:
        raise refuse(f"`{span.name}` starts at {span.start}, not aligned")


def _check_disjoint(spans: list[_Span]) -> None:
    ordered = sorted(spans, key=_position)
    for one, other in pairwise(ordered):
        if one.arena != other.arena:
            continue
        if one.end > other.start:
            raise refuse(f"`{one.name}` and `{other.name}` overlap")


def _position(span: _Span) -> tuple[str, int, int]:
    return span.arena, span.start, span.end


def _check_shape(buffer: BufferSpec, limits: Limits) -> None:
    """Pages, state slots and page tables must be as many and as large as the limits say."""
    shape = list(buffer.tensor.shape)
    wanted = shape
    if buffer.arena == "kv_cache":
        num_pages = limits.num_pages + 1  # the first one is padding
        wanted = [num_pages, 2, limits.page_size, *shape[3:]]
    elif buffer.arena == "state":
        wanted = [limits.num_state_slots, *shape[1:]]
    elif buffer.name == "page_table":
        wanted = [*shape[:-1], limits.table_pages]
    if shape != wanted:
        raise refuse(f"`{buffer.name}` is {shape}, the limits say {wanted}")


def _check_map(pool: Pool) -> None:
    """The memory map counts each arena, and no more than a rank has."""
    memory = pool.memory_bytes_per_rank
    sizes = _arena_bytes(pool)
    for name, counted in memory.model_dump(include=set(get_args(ArenaName))).items():
        size = sizes.get(name, 0)
        if counted != size:
            raise refuse(f"arena `{name}` is {size} bytes, not {counted}")
    steps = [step for program in pool.programs for step in program.steps]
    most = max((step.workspace_bytes for step in steps if isinstance(step, LibraryCall)), default=0)
    if memory.reserved < most:
        raise refuse(f"{memory.reserved} bytes are reserved, a library takes {most}")
    _check_total(memory)


def _arena_bytes(pool: Pool) -> dict[str, int]:
    return {arena.name: arena.size_bytes for arena in pool.arenas}


def _check_total(memory: Memory) -> None:
    total = memory.total
    parts = memory.model_dump(exclude={"total", "capacity"}).values()
    adds_up = min(parts) >= 0 and sum(parts) == total
    if not adds_up:
        raise refuse("the memory map does not add up")
    if total > memory.capacity:
        raise refuse(f"needs {total} bytes, a rank has {memory.capacity}")
