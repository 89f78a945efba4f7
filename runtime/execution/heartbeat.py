"""The ranks of a plan tell each other once a second that they live.

A rank that is frozen, or that died while nobody needed it, is then noticed by all the others, also
while rank 0 has nothing for them to do.
"""

from __future__ import annotations

import os
import threading
import time

import torch
import torch.distributed as dist

from tokenspeed_plan.plans.errors import RankError

_BEAT_S = 1.0
_GRACE_S = 10.0  # in which the main thread may end by itself, with an error of its own


class Heartbeat:
    """A thread that meets those of the other ranks; rank 0 says when.

    Args:
        group: the ranks, with a deadline; nothing else may use it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._is_leader = dist.get_rank() == 0
        self._stopping = threading.Event()
        self._beaten_s = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="heartbeat", daemon=True)
        self._thread.start()

    @property
    def silent_s(self) -> float:
        """Seconds since all ranks were heard last."""
        return time.monotonic() - self._beaten_s

    def stop(self) -> None:
        """End the threads of all ranks; one that waits for a lost rank is left alone."""
        self._stopping.set()
        self._thread.join(2 * _BEAT_S)

    def _work(self) -> None:
        while True:
            if self._is_leader:
                self._stopping.wait(_BEAT_S)
            stops = torch.tensor([float(self._stopping.is_set())])
            try:
                dist.all_reduce(stops, dist.ReduceOp.MAX, group=self._group)
            except RuntimeError as error:
                _end_process(error)
            self._beaten_s = time.monotonic()
            if stops.item():
                return


def _end_process(error: RuntimeError) -> None:
    """End the process if it does not end by itself: its main thread may wait for ever."""
    time.sleep(_GRACE_S)
    os.write(2, f"{link_error(error)}\n".encode())
    os._exit(RankError.exit_code)


def link_error(error: RuntimeError) -> RankError:
    """What torch.distributed says of a lost peer; it has no error class of its own for that."""
    reason = str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0]
    hint = "its own message says why it ended; start all ranks again, a batch goes on where it was"
    return RankError(f"the link to another rank broke: {reason}", hint)
