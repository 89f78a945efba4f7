"""A digest of some of what is handed over, which both sides take of their own memory.

A rank that sends and one that receives have the same bytes of the units between them. Each makes a
number of these; the numbers of all pairs add up to that of the hand-over, whoever adds them up.

On a GPU they are read on a stream of its own, beside the steps that run meanwhile: nobody waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b

import torch
from torch import Tensor

from tokenspeed_plan.runtime.execution.host_copy import HostCopy
from tokenspeed_plan.runtime.pools.blocks import PAGES, STATES, Unit

ROW_BYTES = 1024  # of one row of each unit: little enough to copy to the host
MODULUS = 1 << 128  # of the sums
_STRIDE = 7  # from the page of a unit to that of the next: a prime, so that all have their turn


class Sampler:
    """Samples of the caches of a rank.

    Args:
        arenas: u8 each, by name.
        units: that this rank has in common with each rank of the other pool, by the pair's name.
    """

    def __init__(self, arenas: Mapping[str, Tensor], units: Mapping[str, Sequence[Unit]]) -> None:
        self._arenas = arenas
        self._units = units
        self._stream: torch.cuda.Stream | None = None
        if any(arena.is_cuda for arena in arenas.values()):
            self._stream = torch.cuda.Stream()

    def take(self, pages: Sequence[int], state_slot: int, is_ahead: bool = False) -> Sample:
        """Read some of each unit.

        Args:
            pages: that are handed over, in their order.
            state_slot: of the state that is; 0 where there is none.
            is_ahead: whether steps that are launched already still write it.
        """
        slots = {PAGES: pages, STATES: [state_slot] if state_slot else []}
        on_stream: AbstractContextManager[object] = nullcontext()
        if self._stream is not None:
            on_stream = torch.cuda.stream(self._stream)
            if is_ahead:
                self._stream.wait_stream(torch.cuda.current_stream())
        with on_stream:
            rows = {name: list(self._rows(units, slots)) for name, units in self._units.items()}
            parts = {name: torch.cat(each) for name, each in rows.items() if each}
            return Sample(list(parts), HostCopy(*parts.values()))

    def _rows(self, units: Sequence[Unit], slots: Mapping[str, Sequence[int]]) -> Iterator[Tensor]:
        for index, unit in enumerate(units):
            own = slots[unit.arena]
            if own:
                slot = own[index * _STRIDE % len(own)]
                begin = unit.place(slot) + index % unit.rows * unit.pitch
                yield self._arenas[unit.arena][begin : begin + min(unit.width, ROW_BYTES)]


class Sample:
    """Bytes on their way to the host, of each pair of ranks."""

    def __init__(self, names: Sequence[str], copy: HostCopy) -> None:
        self._names = names
        self._copy = copy

    @property
    def is_ready(self) -> bool:
        """Whether they are there."""
        return self._copy.is_done

    def total(self) -> int:
        """The sum of the digests of all pairs."""
        total = 0
        for name, part in zip(self._names, self._copy.wait(), strict=True):
            digest = blake2b(part.numpy().tobytes(), digest_size=16, key=name.encode())
            total += int.from_bytes(digest.digest(), "little")
        return total % MODULUS
