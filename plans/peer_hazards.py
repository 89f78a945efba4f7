"""Races between ranks: a slot is pushed into only when its rank has read and emptied it.

No rank meets another one: what a rank knows of the others follows from what it received. Who has
read a peer's part of call k knows that the peer has ended its calls before k, since a peer's calls
run one after the other. As in `hazards`, each rank has a clock (Mattern, 1988): how many calls of
each rank are known to be over.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from tokenspeed_plan.plans.ops import ShapeError


@dataclass(frozen=True, slots=True)
class PushCall:
    """An all-reduce inside a kernel: its slots, its counter, how many generations, and its rows."""

    slots: str
    counts: str
    generations: int
    rows: str = "num_tokens"


@dataclass(slots=True)
class _Slot:
    """The calls in which the slots of a generation were read and emptied last, -1 for never."""

    read: int = -1
    emptied: int = -1


@dataclass(slots=True)
class _Ranks:
    """The ranks of a row. All do the same, so one state of slots and counters stands for each.

    Attributes:
        known: for each rank, calls of each rank that it knows to be over.
        counts: by buffer, the running number.
        slots: by buffer and generation.
    """

    known: list[list[int]]
    counts: dict[str, int] = field(default_factory=dict)
    slots: dict[tuple[str, int], _Slot] = field(default_factory=dict)


def check_pushes(sequence: Iterable[PushCall], num_ranks: int) -> None:
    """Refuse calls of one row, and the same again after them, that can meet in a slot.

    Args:
        sequence: the calls in the order in which every rank makes them.
        num_ranks: that push to each other.

    Raises:
        ShapeError: a slot may still be read or emptied when a peer pushes into it, or is not empty.
    """
    ranks = _Ranks([[0] * num_ranks for _ in range(num_ranks)])
    calls = list(sequence)
    for number, call in enumerate(calls * _rounds(calls)):
        _visit(ranks, number, call)


def _rounds(calls: list[PushCall]) -> int:
    """So often that every generation is used again, and once more."""
    return 2 + max((call.generations for call in calls), default=0)


def _visit(ranks: _Ranks, number: int, call: PushCall) -> None:
    """One call on all ranks: push, empty what was read before, read."""
    count = ranks.counts.get(call.counts, 0)
    generation = count % call.generations
    slot = ranks.slots.setdefault((call.slots, generation), _Slot())
    for rank, known in enumerate(ranks.known):
        for peer, over in enumerate(known):
            if peer != rank:
                _check_push(slot, over, call, generation)
    before = ranks.slots.get((call.slots, (generation - 1) % call.generations))
    if before is not None:
        before.emptied = number
    slot.read = number
    for rank, known in enumerate(ranks.known):
        for peer in range(len(known)):
            if peer == rank:
                known[peer] = number + 1
            else:
                known[peer] = number  # its part was sent after the call before
    ranks.counts[call.counts] = count + 1


def _check_push(slot: _Slot, over: int, call: PushCall, generation: int) -> None:
    """A peer's calls before `over` are over: in one of them it emptied what it had read."""
    what = f"generation {generation} of `{call.slots}`"
    if slot.read < 0:
        return
    if slot.emptied <= slot.read:
        raise ShapeError(f"{what} is written again before it is emptied")
    if slot.emptied >= over:
        raise ShapeError(f"{what} is written while a peer may still empty it")
