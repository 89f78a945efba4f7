"""Copies of pages and state slots between a device and the memory of its host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class SlotCopy:
    """What is copied to the host, or back (`is_load`).

    Attributes:
        pages: of the device's cache.
        host_pages: the page of the host that belongs to each.
        state_slot: of the device; a mere number where the model has no recurrent state.
        host_slot: the slot of the host that belongs to it; they are numbered from 1.
    """

    is_load: bool
    pages: tuple[int, ...]
    host_pages: tuple[int, ...]
    state_slot: int
    host_slot: int


class Copying(Protocol):
    """A copy on its way."""

    @property
    def is_load(self) -> bool:
        """Its direction."""

    @property
    def number(self) -> int:
        """Its number among the copies of its direction, from 1."""

    def is_done(self) -> bool:
        """Whether it is over on this rank."""

    def wait(self) -> None:
        """Let the host wait until it is over on this rank."""


class SlotMover(Protocol):
    """Starts copies, which nothing that is launched meanwhile waits for."""

    def start_copy(self, copy: SlotCopy) -> Copying:
        """Copy what was launched so far leaves there; copies of one direction keep their order."""

    def end_copy(self, copying: Copying) -> None:
        """Let what is launched from now on wait for a copy, on all ranks."""
