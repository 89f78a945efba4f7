"""Messages of rank 0 to the others, through a ring of slots in memory that they share.

The writer fills a slot, then its number; a reader finds a message when the number is the next one
and the checksum fits, so that it never sees half a message, whatever order the stores arrive in.
"""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Callable
from mmap import mmap

NUM_SLOTS = 8  # more than the steps that rank 0 is ahead
_LINE = 64  # bytes that no two ranks write to
_NUMBER = struct.Struct("<q")
# Number, checksum, bytes of the payload, and the three of an order.
_HEAD = struct.Struct("<qIIqqq")
_SPINS = 200  # looks without sleeping
_NAP_S = 50e-6
_IDLE_S = 1e-3
_IDLE_AFTER_S = 0.1

Order = tuple[int, int, int]


def ring_bytes(world: int, payload_bytes: int) -> int:
    """The size of a ring of so many ranks."""
    return world * _LINE + NUM_SLOTS * _slot_bytes(payload_bytes)


def _slot_bytes(payload_bytes: int) -> int:
    whole = _HEAD.size + payload_bytes
    return -(-whole // _LINE) * _LINE


class OrderRing:
    """One end of the ring.

    Args:
        memory: `ring_bytes` of it, zero at first.
        rank: 0 writes, the others read.
        world: number of ranks.
        payload_bytes: of the largest message.
        check: called while waiting; raises where waiting is vain.
    """

    def __init__(
        self,
        memory: mmap,
        rank: int,
        world: int,
        payload_bytes: int,
        check: Callable[[], None],
    ) -> None:
        self._memory = memory
        self._rank = rank
        self._readers = range(1, world)
        self._payload_bytes = payload_bytes
        self._first_slot = world * _LINE
        self._check = check
        self._number = 0  # of the last message that was written or read
        self._moved = {reader: (0, time.monotonic()) for reader in self._readers}

    def stalled(self, most_s: float) -> str:
        """Of rank 0: which reader has had a message for longer than that; empty for none."""
        now = time.monotonic()
        for reader in self._readers:
            read = self._read_by(reader)
            if read >= self._number or read != self._moved[reader][0]:
                self._moved[reader] = (read, now)
            elif now - self._moved[reader][1] > most_s:
                return f"rank {reader} has carried out no order for {most_s:.0f} s"
        return ""

    def write(self, order: Order, payload: bytes = b"") -> None:
        """Send a message; waits while the slowest reader is a whole ring behind."""
        assert len(payload) <= self._payload_bytes, "the plan's inputs have their planned sizes"
        oldest = self._number + 1 - NUM_SLOTS
        self._wait(lambda: all(self._read_by(reader) >= oldest for reader in self._readers))
        self._number += 1
        place = self._place(self._number)
        start = place + _HEAD.size
        self._memory[start : start + len(payload)] = payload
        checksum = _checksum(order, payload)
        _HEAD.pack_into(self._memory, place, self._number, checksum, len(payload), *order)

    def read(self, meanwhile: Callable[[], None] | None = None) -> tuple[Order, bytes]:
        """The next message, when it comes; `meanwhile` is called again and again before."""
        found: list[tuple[Order, bytes]] = []

        def is_there() -> bool:
            found.extend(self._peek())
            if not found and meanwhile is not None:
                meanwhile()
            return bool(found)

        self._wait(is_there)
        self._number += 1
        _NUMBER.pack_into(self._memory, self._rank * _LINE, self._number)
        return found[0]

    def _peek(self) -> list[tuple[Order, bytes]]:
        """The next message, if it is there and whole."""
        place = self._place(self._number + 1)
        number, checksum, length, *numbers = _HEAD.unpack_from(self._memory, place)
        if number != self._number + 1 or length > self._payload_bytes:
            return []
        first, second, third = numbers
        start = place + _HEAD.size
        order, payload = (first, second, third), self._memory[start : start + length]
        if _checksum(order, payload) != checksum:
            return []
        return [(order, payload)]

    def _read_by(self, reader: int) -> int:
        """The last message that a rank has read."""
        (number,) = _NUMBER.unpack_from(self._memory, reader * _LINE)
        return int(number)

    def _place(self, number: int) -> int:
        return self._first_slot + number % NUM_SLOTS * _slot_bytes(self._payload_bytes)

    def _wait(self, is_done: Callable[[], bool]) -> None:
        """Look often at first, then less often."""
        for _ in range(_SPINS):
            if is_done():
                return
        begun = time.monotonic()
        while not is_done():
            self._check()
            is_idle = time.monotonic() - begun > _IDLE_AFTER_S
            time.sleep(_IDLE_S if is_idle else _NAP_S)


def _checksum(order: Order, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(struct.pack("<qqq", *order)))
