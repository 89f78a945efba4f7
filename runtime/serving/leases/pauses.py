"""How long a worker waits before it looks for something to do again."""

from __future__ import annotations

import math
import time
from random import Random

FIRST_POLL_S = 0.25
POLLS_PER_TIMEOUT = 4


class Pauses:
    """Pauses that grow: of a thousand workers most wait together, and each look reads two folders.

    Args:
        timeout_s: of a lease.
        jitter: so that they do not look at the same time.
    """

    def __init__(self, timeout_s: float, jitter: Random) -> None:
        self._longest_s = timeout_s / POLLS_PER_TIMEOUT
        self._jitter = jitter
        self.reset()

    def reset(self) -> None:
        """Look soon again: something was found."""
        self._num = 0
        self._until_s = -math.inf

    @property
    def is_over(self) -> bool:
        """Whether the last one is over."""
        return time.monotonic() >= self._until_s

    def begin(self, most_s: float = math.inf) -> float:
        """Begin the next one; returns how long it is, in seconds."""
        seconds = min(FIRST_POLL_S * (1 << min(self._num, 16)), self._longest_s, most_s)
        seconds *= self._jitter.uniform(0.5, 1.5)
        self._num += 1
        self._until_s = time.monotonic() + seconds
        return seconds
