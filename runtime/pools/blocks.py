"""Which bytes of one pool go where in another.

What is handed over lies in slots: pages of keys and values, and slots of recurrent state. A `Unit`
is the part of one buffer that belongs to one group of heads, in every slot; pools whose ranks have
other heads exchange units, and nothing is reshaped. Where both pools are cut alike, a unit is the
whole of a slot.

S slots, T tokens of a page, H heads of a rank, K rows of a convolution's window.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tokenspeed_plan.plans.schema import BufferSpec, Pool
from tokenspeed_plan.plans.validate.pool_rules import cached_tensors

PAGES = "kv_cache"
STATES = "state"


class Copy(NamedTuple):
    """Rows of bytes of an arena, and where they go in the arena of that name of a peer.

    Each row has `width` bytes. From one to the next it is `source_pitch` bytes here, and
    `target_pitch` there.
    """

    arena: str
    source: int
    target: int
    width: int
    rows: int
    source_pitch: int
    target_pitch: int


@dataclass(frozen=True, slots=True)
class Unit:
    """The bytes of one group of heads in one buffer; the rows of a slot follow those before it.

    Attributes:
        buffer: its name.
        arena: of the buffer.
        first: where slot 0 begins in the arena.
        width: bytes of a row.
        rows: of a slot.
        pitch: bytes from one row to the next.
    """

    buffer: str
    arena: str
    first: int
    width: int
    rows: int
    pitch: int

    def place(self, slot: int) -> int:
        """Where a slot begins in the arena."""
        return self.first + slot * self.rows * self.pitch


Pair = tuple[Unit, Unit]  # of the pool that sends, and where it goes


@dataclass(frozen=True, slots=True)
class _Buffer:
    """A buffer of one pool, and how the pool's ranks share its heads.

    Attributes:
        spec: its place and shape.
        sections: elements of the parts of a row whose heads are shared alike; one part but for a
            convolution, whose channels are those of queries, keys and values.
        heads: of one rank.
        ranks: of the pool.
    """

    spec: BufferSpec
    sections: tuple[int, ...]
    heads: int
    ranks: int

    def holders(self, total: int) -> int:
        """Ranks with heads of their own; those beyond the heads of the model hold copies."""
        return min(self.ranks, total)

    def owned(self, rank: int, total: int, groups: int) -> range:
        """The groups of heads of a rank."""
        holders = self.holders(total)
        each = groups // holders
        first = rank * holders // self.ranks * each
        return range(first, first + each)

    def units(self, place: int, parts: int, is_whole: bool) -> Iterator[Unit]:
        """The units of one of the `parts` groups that a rank has: one for each section.

        Where a rank of the other pool has the same one group, it is the whole slot: `is_whole`.
        """
        slots, *row = map(int, self.spec.tensor.shape)
        slot_bytes = self.spec.tensor.size_bytes() // slots
        name, arena, first = self.spec.name, self.spec.arena, self.spec.offset_bytes
        if is_whole:
            yield Unit(name, arena, first, slot_bytes, 1, slot_bytes)
            return
        element_bytes = slot_bytes // math.prod(row)
        pitch = sum(self.sections) * element_bytes
        for section in self.sections:
            width = section // parts * element_bytes
            yield Unit(name, arena, first + place * width, width, slot_bytes // pitch, pitch)
            first += section * element_bytes


def routes(source: Pool, target: Pool, rank: int = 0, other: int = 0) -> list[Pair]:
    """What a rank of one pool has for a rank of another: units, and those that they go to.

    Of heads that several ranks of the source hold, only the first of them sends.
    """
    names = sorted(cached_tensors(source).keys() & cached_tensors(target).keys())
    found: list[Pair] = []
    for one, two in zip(_buffers(source, names), _buffers(target, names), strict=True):
        total = min(one.heads * one.ranks, two.heads * two.ranks)
        groups = math.lcm(one.holders(total), two.holders(total))
        sent, wanted = one.owned(rank, total, groups), two.owned(other, total, groups)
        if rank and one.owned(rank - 1, total, groups) == sent:
            continue
        is_whole = len(sent) == len(wanted) == 1
        for group in sorted({*sent} & {*wanted}):
            from_units = one.units(group - sent.start, len(sent), is_whole)
            to_units = two.units(group - wanted.start, len(wanted), is_whole)
            found += zip(from_units, to_units, strict=True)
    return found


def copies(
    pairs: Iterable[Pair], arena: str, sources: Sequence[int], targets: Sequence[int]
) -> list[Copy]:
    """The copies of some slots of an arena; slots that are neighbours on both sides are one.

    Args:
        pairs: the routes from this rank to another.
        arena: `kv_cache` or `state`.
        sources: slots here.
        targets: the slot there that each goes to.
    """
    runs = _runs(sources, targets)
    found = []
    for one, two in pairs:
        if one.arena != arena:
            continue
        for source, target, count in runs:
            width, rows = one.width, one.rows * count
            if one.pitch == two.pitch == width:  # nothing lies between them
                width, rows = width * rows, 1
            begin, end = one.place(source), two.place(target)
            found.append(Copy(arena, begin, end, width, rows, one.pitch, two.pitch))
    return found


def handed_bytes(source: Pool, target: Pool) -> dict[str, int]:
    """What all ranks of a pool send for one slot, by arena."""
    found = {PAGES: 0, STATES: 0}
    for rank in range(source.layout.num_ranks):
        for other in range(target.layout.num_ranks):
            for one, _ in routes(source, target, rank, other):
                found[one.arena] += one.width * one.rows
    return found


def _runs(sources: Sequence[int], targets: Sequence[int]) -> list[tuple[int, int, int]]:
    """Slots that follow each other on both sides: the first here and there, and how many."""
    runs: list[tuple[int, int, int]] = []
    for slot, place in zip(sources, targets, strict=True):
        if runs:
            source, target, count = runs[-1]
            if (slot, place) == (source + count, target + count):
                runs[-1] = source, target, count + 1
                continue
        runs.append((slot, place, 1))
    return runs


def _buffers(pool: Pool, names: Sequence[str]) -> list[_Buffer]:
    """The cached buffers of a pool that have these names.

    Keys and values are [S, 2, T, H, size]; a delta rule's state is [S, H, size, size]; a window of
    its convolution is [S, K, channels of queries, keys and values].
    """
    specs = {buffer.name: buffer for buffer in pool.buffers}
    ranks = pool.layout.num_ranks
    found = []
    for name in names:
        spec = specs[name]
        shape = tuple(map(int, spec.tensor.shape))
        if spec.arena == PAGES:
            found.append(_Buffer(spec, (math.prod(shape[3:]),), shape[3], ranks))
            continue
        layer = name.rpartition(".")[0]
        state = tuple(map(int, specs[f"{layer}.ssm_state"].tensor.shape))
        found.append(_state_buffer(spec, shape, state, ranks))
    return found


def _state_buffer(
    spec: BufferSpec, shape: tuple[int, ...], state: tuple[int, ...], ranks: int
) -> _Buffer:
    """A buffer of recurrent state; `state` is the shape of the delta rule's, in the same layer."""
    _, num_value_heads, key_size, value_size = state
    if shape == state:
        return _Buffer(spec, (math.prod(shape[1:]),), num_value_heads, ranks)
    values = num_value_heads * value_size
    keys = (shape[-1] - values) // 2
    return _Buffer(spec, (keys, keys, values), keys // key_size, ranks)
