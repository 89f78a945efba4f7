"""Rows of a step that the host makes of the tokens of the step before, brought to the device."""

from __future__ import annotations

import torch

from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.execution.executor import Executor


class LateRows:
    """An io buffer with a row for each sequence, which is written when a step is committed.

    By then the device has read what was written before, so that there is one copy on the host.

    Args:
        plan: says how many rows there are.
        executor: has the buffer, on all ranks.
        name: of the buffer.

    Attributes:
        words: what is to be sent, i32, a row for each sequence.
    """

    def __init__(self, plan: Plan, executor: Executor, name: str) -> None:
        self._executor = executor
        self._name = name
        device = executor.buffer(name, 0, plan.pool.limits.max_seqs)
        self._host = torch.zeros(device.shape, dtype=torch.int32, pin_memory=device.is_cuda)
        self.words = self._host.numpy()

    def send(self, first: int, end: int, num_words: int | None = None) -> None:
        """Send some rows, or their first words."""
        self._executor.write_rows(self._name, first, self._host[first:end, :num_words])
