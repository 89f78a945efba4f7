"""What happens when a rank is lost: the process ends, with one error that names the rank.

The main thread ends by itself where it can. Where it waits for something that never comes, such as
a kernel that waits for its peer, the process is ended under it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from tokenspeed_plan.plans.errors import RankError

GRACE_S = 2.0  # in which the main thread may find out by itself
_CLEAN_UP_S = 3.0  # in which it may then end by itself
_KNOWN_S = 1.0  # from a broken link to the reason of it
HINT = "its own message says why it ended; start all ranks again, a batch goes on where it was"


class RankLoss:
    """The first rank that was lost, and what is done about it.

    Attributes:
        reason: why; empty while all ranks live.
        on_loss: called with the error as soon as the first rank is lost.
        before_end: called before the process is ended under its main thread.
    """

    def __init__(self) -> None:
        self.on_loss: Callable[[RankError], object] = lambda error: None
        self.before_end: Callable[[], object] = lambda: None
        self._known = threading.Event()
        self._taken = threading.Event()
        self.reason = ""
        self._is_over = False

    def begin(self) -> None:
        """Ranks that end from here on are a loss."""
        self._is_over = False

    def note(self, reason: str) -> None:
        """A rank is lost; the first reason counts."""
        if self._known.is_set() or self._is_over:
            return
        self.reason = reason
        self._known.set()
        self.on_loss(RankError(reason, HINT))
        threading.Thread(target=self._end, name="rank loss", daemon=True).start()

    def finish(self) -> None:
        """Ranks that end from here on are no loss; after one, the process ends in any case."""
        self._is_over = not self.is_known

    @property
    def is_known(self) -> bool:
        """Whether a rank is lost."""
        return self._known.is_set()

    def error(self, what: str = "", wait_s: float = _KNOWN_S) -> RankError:
        """The error of a main thread that cannot go on.

        Args:
            what: broke; said where no lost rank explains it.
            wait_s: how long to wait for a reason.
        """
        self._known.wait(wait_s)
        self._taken.set()
        return RankError(self.reason or what, HINT)

    def check(self) -> None:
        """Nothing while all ranks live.

        Raises:
            RankError: one is lost.
        """
        if self._known.is_set():
            raise self.error()

    def _end(self) -> None:
        if not self._taken.wait(GRACE_S) and not self._is_over:
            os.write(2, f"{RankError(self.reason, HINT)}\n".encode())
            self._leave()
        threading.Event().wait(_CLEAN_UP_S)
        if not self._is_over:
            self._leave()

    def _leave(self) -> None:
        self.before_end()
        os._exit(RankError.exit_code)


LOSS = RankLoss()
