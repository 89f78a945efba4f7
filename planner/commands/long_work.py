"""What a command says on stderr about work that takes long: how much is done, the time left."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import TextIO

TERMINAL_INTERVAL_S = 0.2
PLAIN_INTERVAL_S = 10.0
_CLEAR_LINE = "\r\x1b[K"


class LongWork:
    """Shows stages of work: a line that is rewritten on a terminal, else one every 10 s.

    Work that ends within the first interval, or the first second on a terminal, shows nothing; and
    none does where it is not shown.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
        is_shown: bool = True,
    ) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._is_terminal = self._stream.isatty()
        self._interval_s = TERMINAL_INTERVAL_S if self._is_terminal else PLAIN_INTERVAL_S
        self._next_s = math.inf
        if is_shown:
            self._next_s = clock() + max(self._interval_s, 1.0)
        self._stage = ""
        self._begun_s = 0.0
        self.title = ""

    def __enter__(self) -> LongWork:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_terminal and self._next_s < math.inf:
            self._print(_CLEAR_LINE)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Say that `done` of `total` parts of a stage are done, if the interval is over."""
        now = self._clock()
        if stage != self._stage or done == 0:
            self._stage, self._begun_s = stage, now
        if now < self._next_s:
            return
        self._next_s = now + self._interval_s
        text = f"{self.title}{stage}: {done} of {total}{self._left(done, total, now)}"
        if self._is_terminal:
            self._print(_CLEAR_LINE + text)
        else:
            self._print(text + "\n")

    def _left(self, done: int, total: int, now: float) -> str:
        if not done:
            return ""
        left_s = (now - self._begun_s) * (total - done) / done
        return f", {left_s:.0f} s left"

    def _print(self, text: str) -> None:
        print(text, end="", file=self._stream, flush=True)
