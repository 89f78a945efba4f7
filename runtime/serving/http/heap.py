"""Gives what is free inside the C heap back to the system.

Bodies and prompts of all lengths leave holes in it, which grow for hours while nothing is held.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

EVERY_S = 10.0


def trim_heap() -> None:
    """Release free pages of the heap, where the C library can (glibc: `malloc_trim`)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class HeapTrimmer:
    """Trims the heap every now and then; `note` is called several times a second."""

    def __init__(
        self,
        trim: Callable[[], None] = trim_heap,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trim = trim
        self._clock = clock
        self._next_s = clock() + EVERY_S

    def note(self) -> None:
        """Trim, if it is time to."""
        if self._clock() >= self._next_s:
            self._trim()
            self._next_s = self._clock() + EVERY_S
