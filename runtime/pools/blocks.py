"""Which bytes of one pool go where in another, as lists of places.

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

import numpy as np
import numpy.typing as npt

from tokenspeed_plan.plans.schema import BufferSpec, Pool
from tokenspeed_plan.plans.validate.pool_rules import cached_tensors

Places = npt.NDArray[np.int64]
PAGES = "kv_cache"
STATES = "state"


@dataclass(frozen=True)
class Unit:
    """The bytes of one group of heads in one buffer.

    Attributes:
        arena: of the buffer.
        first: where slot 0 begins in the arena.
        slot_bytes: from one slot to the next.
        starts, sizes: its runs of bytes in a slot.
    """

    arena: str
    first: int
    slot_bytes: int
    starts: Places
    sizes: Places

    def places(self, slots: Sequence[int]) -> Places:
        """Where its runs begin in the arena, slot by slot."""
        begins = self.first + np.asarray(slots, np.int64) * self.slot_bytes
        return (begins[:, None] + self.starts[None, :]).ravel()


@dataclass(frozen=True)
class Copies:
    """Bytes of an arena that go to places in an arena of that name of a peer."""

    arena: str
    sources: Places
    targets: Places
    sizes: Places

    @property
    def size_bytes(self) -> int:
        """All bytes."""
        return int(self.sizes.sum())

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Source, target and size of each."""
        return iter(
            zip(self.sources.tolist(), self.targets.tolist(), self.sizes.tolist(), strict=True)
        )


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

    def unit(self, place: int, parts: int, is_whole: bool) -> Unit:
        """The unit of one of the `parts` groups that a rank has.

        Where a rank of the other pool has the same one group, the unit is one run: `is_whole`.
        """
        slots, *row = map(int, self.spec.tensor.shape)
        slot_bytes = self.spec.tensor.size_bytes() // slots
        element_bytes = slot_bytes // math.prod(row)
        starts, sizes = np.zeros(1, np.int64), np.array([math.prod(row)])
        if not is_whole:
            starts, sizes = _runs(math.prod(row), self.sections, place, parts)
        first = self.spec.offset_bytes
        return Unit(
            self.spec.arena, first, slot_bytes, starts * element_bytes, sizes * element_bytes
        )


def routes(source: Pool, target: Pool, rank: int = 0, other: int = 0) -> list[tuple[Unit, Unit]]:
    """What a rank of one pool has for a rank of another: units, and those that they go to.

    Of heads that several ranks of the source hold, only the first of them sends.
    """
    names = sorted(cached_tensors(source).keys() & cached_tensors(target).keys())
    found: list[tuple[Unit, Unit]] = []
    for one, two in zip(_buffers(source, names), _buffers(target, names), strict=True):
        total = min(one.heads * one.ranks, two.heads * two.ranks)
        groups = math.lcm(one.holders(total), two.holders(total))
        sent, wanted = one.owned(rank, total, groups), two.owned(other, total, groups)
        if rank and one.owned(rank - 1, total, groups) == sent:
            continue
        is_whole = len(sent) == len(wanted) == 1
        for group in sorted({*sent} & {*wanted}):
            from_unit = one.unit(group - sent.start, len(sent), is_whole)
            found.append((from_unit, two.unit(group - wanted.start, len(wanted), is_whole)))
    return found


def copies(
    pairs: Iterable[tuple[Unit, Unit]],
    arena: str,
    sources: Sequence[int],
    targets: Sequence[int],
) -> Copies:
    """The copies of some slots of an arena, with neighbours joined.

    Args:
        pairs: the routes from this rank to another.
        arena: `kv_cache` or `state`.
        sources: slots here.
        targets: the slot there that each goes to.
    """
    begins, ends, sizes = [], [], []
    for one, two in pairs:
        if one.arena == arena and len(sources):
            begins.append(one.places(sources))
            ends.append(two.places(targets))
            sizes.append(np.tile(one.sizes, len(sources)))
    if not begins:
        none = np.zeros(0, np.int64)
        return Copies(arena, none, none, none)
    return _joined(arena, np.concatenate(begins), np.concatenate(ends), np.concatenate(sizes))


def _joined(arena: str, sources: Places, targets: Places, sizes: Places) -> Copies:
    """Copies that follow each other on both sides become one."""
    goes_on = (sources[1:] == sources[:-1] + sizes[:-1]) & (
        targets[1:] == targets[:-1] + sizes[:-1]
    )
    heads = np.concatenate([[0], np.flatnonzero(~goes_on) + 1])
    return Copies(arena, sources[heads], targets[heads], np.add.reduceat(sizes, heads))


def _runs(row: int, sections: Sequence[int], place: int, parts: int) -> tuple[Places, Places]:
    """Where one part of the heads lies in a slot of `row` elements; sizes are elements, too.

    The sections lie side by side, again and again; in each, the heads do.
    """
    width = sum(sections)
    repeats = np.arange(row // width, dtype=np.int64) * width
    starts, sizes, begin = [], [], 0
    for section in sections:
        size = section // parts
        starts.append(repeats + begin + place * size)
        sizes.append(np.full(len(repeats), size, np.int64))
        begin += section
    order = np.argsort(np.concatenate(starts), kind="stable")
    return np.concatenate(starts)[order], np.concatenate(sizes)[order]


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
