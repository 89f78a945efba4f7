"""Signals that let a loop stop between two steps."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Self


class Interrupt:
    """In its `with` block the first signal sets `seen`; a second raises KeyboardInterrupt."""

    def __init__(self, *signals: signal.Signals) -> None:
        self.seen = False
        self._signals = signals

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._note) for number in self._signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True
