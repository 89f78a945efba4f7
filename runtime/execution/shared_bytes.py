"""Memory that the processes of one host share. It has no name that a killed process could leave."""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
from collections.abc import Callable

from tokenspeed_plan.plans.errors import RankError


def share(size_bytes: int, exchange: Callable[[str], list[str]]) -> list[mmap.mmap]:
    """Bytes of each rank, zero at first, mapped into every one of them.

    Args:
        size_bytes: what this rank gives; where it is zero, it gives nothing and is left out.
        exchange: gathers a text of each rank; every rank calls this function at the same time.

    Raises:
        RankError: there is not so much memory, or the ranks are not on one host.
    """
    descriptor, path = _create(size_bytes) if size_bytes else (-1, "")
    try:
        maps = [_map(other) for other in exchange(path) if other]
        exchange("")  # all have opened it
    finally:
        if descriptor >= 0:
            os.close(descriptor)
            if sys.platform != "linux":
                os.unlink(path)
    return maps


def create(size_bytes: int) -> tuple[mmap.mmap, str]:
    """Zeros that processes of this host can map, and a path by which they find them.

    They are there as long as this process: its descriptor stays open.

    Raises:
        OSError: there is not so much memory.
    """
    descriptor, path = _create(size_bytes)
    return mmap.mmap(descriptor, size_bytes), path


def _create(size_bytes: int) -> tuple[int, str]:
    """A file in memory, and a path by which other processes find it while it is open here."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("ranks")
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
    else:
        descriptor, path = tempfile.mkstemp(prefix="tokenspeed-")
    os.truncate(descriptor, size_bytes)
    return descriptor, path


def _map(path: str) -> mmap.mmap:
    try:
        with open(path, "r+b") as file:
            return mmap.mmap(file.fileno(), 0)
    except OSError as error:
        raise RankError(
            f"a rank cannot open the memory of another one, `{path}`: {error.strerror}",
            "start all ranks of a plan on one host, in one container",
        ) from error
