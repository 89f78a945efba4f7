"""What the ranks of a pool leave for rank 0 to read, in memory that they share: nobody waits.

A rank fills the place of a job once; rank 0 finds it when the job's number is there and the
checksum fits, whatever order the stores arrive in.
"""

from __future__ import annotations

import struct
import zlib
from mmap import mmap

MAX_JOBS = 1024  # at once; the place of a job is that of the one so many before
_REPORT = struct.Struct("<q?16s")  # the number of a job, whether it went well, and a sum
_CHECKSUM = struct.Struct("<I")
_PLACE_BYTES = 32


def report_bytes(world: int) -> int:
    """The memory of so many ranks, zero at first."""
    return world * MAX_JOBS * _PLACE_BYTES


class RankReports:
    """The reports of all ranks."""

    def __init__(self, memory: mmap) -> None:
        self._memory = memory

    def leave(self, rank: int, job: int, total: int | None) -> None:
        """Report a job of a rank: its sum, or None where it has failed."""
        content = _REPORT.pack(job, total is not None, (total or 0).to_bytes(16, "little"))
        place = _place(rank, job)
        _CHECKSUM.pack_into(self._memory, place + _REPORT.size, zlib.crc32(content))
        self._memory[place : place + _REPORT.size] = content

    def find(self, rank: int, job: int) -> tuple[bool, int] | None:
        """Whether a job of a rank went well, and its sum; None while it is not over."""
        place = _place(rank, job)
        content = self._memory[place : place + _REPORT.size]
        number, is_right, total = _REPORT.unpack(content)
        (checksum,) = _CHECKSUM.unpack_from(self._memory, place + _REPORT.size)
        if number != job or zlib.crc32(content) != checksum:
            return None
        return is_right, int.from_bytes(total, "little")


def _place(rank: int, job: int) -> int:
    return (rank * MAX_JOBS + job % MAX_JOBS) * _PLACE_BYTES
