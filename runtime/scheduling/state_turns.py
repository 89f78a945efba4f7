"""Which state slot a sequence continues from, and which it writes next."""

from __future__ import annotations

from tokenspeed_plan.runtime.cache.prefix_cache import PrefixCache
from tokenspeed_plan.runtime.scheduling.sequence import Sequence


def go_on_in_place(cache: PrefixCache, sequence: Sequence) -> None:
    """Continue in the state slot that was written: from now on it is also the one to write."""
    before = sequence.state_slot
    sequence.state_slot = sequence.own_slots[0]
    if before not in (0, sequence.state_slot):
        cache.state_slots.drop(before)


def part_from_cache(cache: PrefixCache, sequence: Sequence) -> None:
    """Write another state slot where the cache now holds this one.

    Where there is no other, the cache gives up this checkpoint.
    """
    if cache.state_slots.holders(sequence.state_slot) == 1:
        return
    other = cache.take_spare_state_slot()
    if other is None:
        cache.forget_checkpoint(sequence.state_slot)
        return
    sequence.own_slots = [other]
    sequence.pages_version += 1


def exchange_state_slot(cache: PrefixCache, sequence: Sequence, column: int) -> bool:
    """Continue from the state slot that was written; the one before it is written next.

    Returns:
        Whether it was the sequence's own. If others hold it too, or there was none, a slot is
        missing in its place.
    """
    before = sequence.state_slot
    sequence.state_slot = sequence.own_slots[column]
    if before and cache.state_slots.holders(before) == 1:
        sequence.own_slots[column] = before
        return True
    del sequence.own_slots[column]
    if before:
        cache.state_slots.drop(before)
    return False


def take_recomputed(sequence: Sequence) -> None:
    """Take the state that a step in flight recomputes before its queries, where a plan does so.

    It is the state after all tokens that are committed, and the step writes it into its own slot:
    whoever goes on from it need not compute the accepted inputs that were kept.
    """
    if sequence.num_kept:
        own_slots = sequence.own_slots
        sequence.state_slot, own_slots[0] = own_slots[0], sequence.state_slot
        sequence.num_kept = 0
