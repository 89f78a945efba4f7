"""From the engine's thread to the readers on the loop, in rounds."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


REST = 1.0  # times what a round has taken
LONGEST_REST_S = 5e-3


class Deliveries(Generic[Item]):
    """Hands to a loop what a thread makes; a round takes all that has gathered.

    The two share Python's interpreter. After a round the loop rests for a multiple of the time that
    it and the readers have worked, and for `LONGEST_REST_S` at most, so that with many readers and
    short steps the thread keeps its share of the interpreter, and the readers get more at once.

    Args:
        loop: of the readers.
        deliver: gives the items to their readers; called on the loop.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, deliver: Callable[[list[Item]], object]
    ) -> None:
        self._loop = loop
        self._deliver = deliver
        self._lock = threading.Lock()
        self._items: list[Item] = []
        self._is_awake = False  # a round is due

    def put(self, item: Item) -> None:
        """Add an item; called by the thread."""
        with self._lock:
            self._items.append(item)
            was_awake, self._is_awake = self._is_awake, True
        if not was_awake:
            self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        """A round, if there is anything."""
        with self._lock:
            items, self._items = self._items, []
            self._is_awake = bool(items)
        if not items:
            return
        begun_s = time.thread_time()
        try:
            self._deliver(items)
        finally:
            self._loop.call_soon(self._rest, begun_s)  # after the readers that were woken

    def _rest(self, begun_s: float) -> None:
        worked_s = time.thread_time() - begun_s
        self._loop.call_later(min(REST * worked_s, LONGEST_REST_S), self._begin)
