"""Memory that the processes of one host share: a file in memory without a name."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from tokenspeed_plan.plans.errors import RankError

_IN_MEMORY = Path("/dev/shm")


def share(size_bytes: int, exchange: Callable[[str], list[str]]) -> list[mmap.mmap]:
    """Bytes of each rank, zero at first, mapped into every one of them.

    Args:
        size_bytes: what each rank gives; where it is zero, it gives nothing and is left out.
        exchange: gathers a text of each rank; every rank calls this function at the same time.

    Raises:
        RankError: there is not so much shared memory, or the ranks are not on one host.
    """
    path = _create(size_bytes) if size_bytes else ""
    try:
        maps = [_map(other) for other in exchange(path) if other]
        exchange("")  # all have opened it
    finally:
        if path:
            os.unlink(path)
    return maps


def _create(size_bytes: int) -> str:
    folder = _IN_MEMORY if _IN_MEMORY.is_dir() else None
    descriptor, path = tempfile.mkstemp(prefix="tokenspeed-", dir=folder)
    try:
        # Without its pages the first write to one that cannot be had would end the process.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size_bytes)
        else:
            os.truncate(descriptor, size_bytes)
    except OSError as error:
        os.unlink(path)
        raise RankError(
            f"cannot share {size_bytes} bytes between ranks in `{folder}`: {error.strerror}",
            "make it larger, in a container with `--shm-size 4g`",
        ) from error
    finally:
        os.close(descriptor)
    return path


def _map(path: str) -> mmap.mmap:
    try:
        with open(path, "r+b") as file:
            return mmap.mmap(file.fileno(), 0)
    except OSError as error:
        raise RankError(
            f"a rank cannot open the memory of another one, `{path}`: {error.strerror}",
            "start all ranks of a plan on one host, in one container",
        ) from error
