"""How far a run is, on stderr: one line that is rewritten on a terminal, else a line every few seconds."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tokenspeed_plan.runtime.serving.batch.summary import Tally

TERMINAL_EVERY_S, PLAIN_EVERY_S = 0.2, 5.0


class Progress:
    """Shows a tally now and then."""

    def __init__(self, tally: Tally, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._tally = tally
        self.stream = stream or sys.stderr
        self._terminal = self.stream.isatty()
        self._every_s = TERMINAL_EVERY_S if self._terminal else PLAIN_EVERY_S
        self._next_s = float("inf") if quiet else time.perf_counter() + self._every_s

    def show(self) -> None:
        """Show the state if it is time to."""
        now = time.perf_counter()
        if now >= self._next_s:
            self._next_s = now + self._every_s
            end = "" if self._terminal else "\n"
            start = "\r\x1b[K" if self._terminal else ""
            print(f"{start}{self._text(now)}", end=end, file=self.stream, flush=True)

    def close(self) -> None:
        """Leave the terminal's line empty."""
        if self._terminal:
            print("\r\x1b[K", end="", file=self.stream, flush=True)

    def _text(self, now: float) -> str:
        tally = self._tally
        tokens_in, tokens_out = tally.rates()
        new = tally.answered + tally.failed
        left = (tally.num_rows - tally.done) * (now - tally.begun_s) / new if new else None
        eta = f", {left:.0f} s left" if left is not None else ""
        return (
            f"{tally.done}/{tally.num_rows} done, {tally.failed} failed, "
            f"{tokens_in:.0f} tokens/s in, {tokens_out:.0f} out{eta}"
        )
