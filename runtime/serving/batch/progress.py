"""Progress of a run on stderr: a line that is rewritten on a terminal, else one every 5 s."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tokenspeed_plan.runtime.serving.batch.summary import Tally
from tokenspeed_plan.runtime.serving.batch.writers import discard_rest

TERMINAL_INTERVAL_S = 0.2
PLAIN_INTERVAL_S = 5.0
_CLEAR_LINE = "\r\x1b[K"


class Progress:
    """Shows a tally at intervals."""

    def __init__(self, tally: Tally, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._tally = tally
        self._stream: TextIO | None = stream or sys.stderr  # None where it is closed
        self._is_terminal = self._stream is not None and self._stream.isatty()
        self._interval_s = PLAIN_INTERVAL_S
        if self._is_terminal:
            self._interval_s = TERMINAL_INTERVAL_S
        self._next_s = time.perf_counter() + self._interval_s
        if quiet:
            self._next_s = float("inf")

    def show(self) -> None:
        """Show the state if the interval is over."""
        now = time.perf_counter()
        if now < self._next_s:
            return
        self._next_s = now + self._interval_s
        text = self._text(now)
        if self._is_terminal:
            self.write(_CLEAR_LINE + text)
        else:
            self.write(text + "\n")

    def close(self) -> None:
        """Leave the terminal's line empty."""
        if self._is_terminal:
            self.write(_CLEAR_LINE)

    def write(self, text: str) -> None:
        """Write to stderr; where nobody reads it any more, the run goes on without a word."""
        if self._stream is None:
            return
        try:
            print(text, end="", file=self._stream, flush=True)
        except OSError:
            discard_rest(self._stream)

    def _text(self, now: float) -> str:
        tally = self._tally
        tokens_in, tokens_out = tally.rates()
        text = (
            f"{tally.done}/{tally.num_rows} done, {tally.failed} failed, "
            f"{tokens_in:.0f} tokens/s in, {tokens_out:.0f} out"
        )
        num_new = tally.answered + tally.failed
        if num_new:
            left_s = (tally.num_rows - tally.done) * (now - tally.begun_s) / num_new
            text += f", {left_s:.0f} s left"
        return text
