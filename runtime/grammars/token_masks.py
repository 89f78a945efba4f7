"""The masks of a step's constrained sequences, brought to the device before the step is launched.

Shapes: S sequences, R queries of each, W words of the mask of one query.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from tokenspeed_plan.plans.ops import TOKEN_MASK, mask_words
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.grammars.matcher import fill_ahead
from tokenspeed_plan.runtime.scheduling.batch import Batch

FEW = 4  # rows that one thread fills sooner than several
THREADS = 8


class TokenMasks:
    """Writes masks; nothing where the plan takes no grammars.

    They are written when the step before is committed, so that the device has copied its masks.

    Args:
        plan: says whether there are masks, and for how many queries.
        buffer: from a name and the size of a batch to a buffer of the io arena.
    """

    def __init__(self, plan: Plan, buffer: Callable[[str, int, int], Tensor]) -> None:
        self._device: Tensor | None = None
        self._words = mask_words(plan.model.vocab_size)
        if plan.takes_grammars:
            self._device = buffer(TOKEN_MASK, 0, plan.pool.limits.max_seqs)
            is_cuda = self._device.is_cuda
            self._host = torch.zeros(self._device.shape, dtype=torch.int32, pin_memory=is_cuda)
            self._mask_SRW = self._host.numpy().reshape(len(self._host), -1, self._words)
            self._threads = ThreadPoolExecutor(THREADS, "masks")

    def write(self, batch: Batch) -> None:
        """Send what the next tokens of each constrained sequence may be."""
        if self._device is None:
            return
        sequences = batch.sequences
        rows = [
            row
            for row, sequence in enumerate(sequences)
            if sequence.matcher is not None and sequence.is_running and batch.makes_token(row)
        ]
        if not rows:
            return
        if len(rows) <= FEW:
            for row in rows:
                self._fill(batch, row)
        else:
            list(self._threads.map(lambda row: self._fill(batch, row), rows))
        first, end = rows[0], rows[-1] + 1
        self._device[first:end].copy_(self._host[first:end], non_blocking=True)

    def _fill(self, batch: Batch, row: int) -> None:
        """The masks of one sequence."""
        matcher = batch.sequences[row].matcher
        assert matcher is not None
        fill_ahead(matcher, self._mask_SRW[row], batch.drafts_of(row))
