"""The ranks of a plan see in shared memory that the others live.

A rank that is frozen, or that died while nobody needed it, is then noticed by all the others, also
while rank 0 has nothing for them to do.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path

from tokenspeed_plan.runtime.execution.rank_loss import RankLoss

BEAT_S = 0.25
FROZEN_STATES = ("T", "t")  # stopped by a signal or a debugger
FROZEN_S = 3.0  # a profiler stops a process for less
RECORD_BYTES = 64  # of each rank: its beats and its process, alone in a cache line
_RECORD = struct.Struct("<qq")
_ENDED = -1  # instead of beats: the rank has ended as it should


@dataclass(slots=True)
class _Watched:
    """What is known of another rank, counted in own beats.

    A machine that stands still as a whole has lost no rank.
    """

    seen: int = 0
    silent: int = 0
    frozen: int = 0
    gone: int = 0


class Heartbeat:
    """A thread that counts beats for the others, and looks at theirs.

    Args:
        memory: a record of each rank.
        rank: whose beats this process counts.
        world: number of ranks.
        silence_s: how long a rank may count no beat although its process runs.
        loss: is told of a rank that died, is frozen or is silent.

    Attributes:
        watch: called with each beat; what else is wrong with another rank, or nothing.
    """

    def __init__(
        self, memory: mmap, rank: int, world: int, silence_s: float, loss: RankLoss
    ) -> None:
        self._memory = memory
        self._rank = rank
        self._others = {other: _Watched() for other in range(world) if other != rank}
        self._max_silent = max(round(silence_s / BEAT_S), 4)
        self._loss = loss
        self.watch: Callable[[], str] = str
        self._beats = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="heartbeat", daemon=True)
        self._beat()
        self._thread.start()

    @property
    def silent_s(self) -> float:
        """Seconds since the rank was heard that has been silent for longest."""
        return max((other.silent for other in self._others.values()), default=0) * BEAT_S

    def stop(self) -> None:
        """Tell the other ranks that this one is about to end."""
        self._stopping.set()
        self._thread.join(2 * BEAT_S)
        _RECORD.pack_into(self._memory, self._rank * RECORD_BYTES, _ENDED, os.getpid())

    def has_ended(self, rank: int) -> bool:
        """Whether a rank has ended as it should."""
        return self._read(rank)[0] == _ENDED

    def _work(self) -> None:
        while not self._stopping.wait(BEAT_S):
            self._beat()
            faults = (*map(self._fault, self._others), self.watch())
            reason = next(filter(None, faults), "")
            if reason:
                self._loss.note(reason)
                return

    def _beat(self) -> None:
        self._beats += 1
        _RECORD.pack_into(self._memory, self._rank * RECORD_BYTES, self._beats, os.getpid())

    def _read(self, rank: int) -> tuple[int, int]:
        beats, process = _RECORD.unpack_from(self._memory, rank * RECORD_BYTES)
        return beats, process

    def _fault(self, other: int) -> str:
        """What is wrong with a rank; empty where nothing is."""
        beats, process = self._read(other)
        if beats in (0, _ENDED):  # not there yet, or no longer
            return ""
        watched, state = self._others[other], process_state(process)
        watched.silent = watched.silent + 1 if beats == watched.seen else 0
        watched.frozen = watched.frozen + 1 if state in FROZEN_STATES else 0
        watched.gone = watched.gone + 1 if state in ("", "X", "Z") else 0
        watched.seen = beats
        name = f"rank {other} (process {process})"
        if watched.gone > 1:  # whoever started it may know more after the first time
            return f"{name} has ended"
        if watched.frozen * BEAT_S >= FROZEN_S:
            return f"{name} is frozen"
        if watched.silent >= self._max_silent:
            return f"{name} has not been heard for {watched.silent * BEAT_S:.0f} s"
        return ""


def process_state(process: int) -> str:
    """The state letter of a process in `ps`; empty where there is none, `?` if it is not known."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return "" if Path("/proc/self/stat").exists() else "?"
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[0]
