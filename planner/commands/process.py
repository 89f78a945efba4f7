"""What a command sets in its process before it opens a file or loads PyTorch."""

from __future__ import annotations

import os
import sys

# By default, OpenMP's threads spin while they wait for work: beside any other load on the cores
# they take the time that the working ones need. Sleeping threads are as fast on an idle machine.
_OPENMP = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


def set_up_process() -> None:
    """Let OpenMP's idle threads sleep, and reserve the numbers of closed standard streams.

    What the user has set stays. OpenMP reads its variables when PyTorch is loaded; processes that
    this one starts inherit them.
    """
    for name, value in _OPENMP.items():
        os.environ.setdefault(name, value)
    _reserve_standard_streams()


def _reserve_standard_streams() -> None:
    """Open the null device in place of closed standard streams.

    Else the next file that is opened gets the number of one, and what a library writes to standard
    error goes into it.
    """
    number = os.open(os.devnull, os.O_RDWR)
    while number <= 2:
        number = os.open(os.devnull, os.O_RDWR)
    os.close(number)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
