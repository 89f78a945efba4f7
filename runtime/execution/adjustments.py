"""Penalties and biases of a step's sequences, brought to the device before the step is launched."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from tokenspeed_plan.plans.ops import ADJUSTMENTS
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.request import SamplingParams
from tokenspeed_plan.runtime.scheduling.batch import Batch

IN_PROMPT, IN_ANSWER = 1, 2  # what a token counts, once and each time


class TokenCounts:
    """The tokens of a sequence whose logits are changed.

    Args:
        params: with penalties or biases.
        prompt_ids: count for the repetition penalty alone.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int]) -> None:
        self._bias = dict(params.logit_bias)
        self._seen = dict.fromkeys(self._bias, 0)
        if params.repetition_penalty != 1:
            self._seen |= dict.fromkeys(prompt_ids, IN_PROMPT)

    def add(self, token_id: int) -> None:
        """Count a token of the answer."""
        self._seen[token_id] = self._seen.get(token_id, 0) + IN_ANSWER

    def fill(self, words: np.ndarray, drafts: Iterable[int]) -> int:
        """Write its adjustments as the operator reads them.

        Args:
            words: of its row.
            drafts: tokens that the step counts itself; each has an entry.

        Returns:
            How many words are written.
        """
        seen = dict.fromkeys(drafts, 0) | self._seen
        end = 1 + 3 * len(seen)
        words[0] = len(seen)
        entries = words[1:end].reshape(-1, 3)
        entries[:, 0] = np.fromiter(seen.keys(), np.int32, len(seen))
        entries[:, 1] = np.fromiter(seen.values(), np.int32, len(seen))
        bias = (self._bias.get(token, 0.0) for token in seen)
        entries[:, 2] = np.fromiter(bias, np.float32, len(seen)).view(np.int32)
        return end


class Adjustments:
    """Writes adjustments; nothing where the plan takes no penalties.

    The memory that the device copies from is written again when the step before is committed: no
    step is launched ahead of one with a penalised sequence.

    Args:
        plan: says whether there are any.
        buffer: from a name and the size of a batch to a buffer of the io arena.
    """

    def __init__(self, plan: Plan, buffer: Callable[[str, int, int], Tensor]) -> None:
        self._device: Tensor | None = None
        if plan.takes_penalties:
            self._device = buffer(ADJUSTMENTS, 0, plan.pool.limits.max_seqs)
            is_cuda = self._device.is_cuda
            self._host = torch.zeros(self._device.shape, dtype=torch.int32, pin_memory=is_cuda)
            self._words = self._host.numpy()

    def write(self, batch: Batch) -> None:
        """Send what is changed for each penalised sequence."""
        if self._device is None:
            return
        for row, sequence in enumerate(batch.sequences):
            if sequence.counts is not None and batch.makes_token(row):
                end = sequence.counts.fill(self._words[row], batch.drafts_of(row))
                self._device[row, :end].copy_(self._host[row, :end], non_blocking=True)
