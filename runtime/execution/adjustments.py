"""Penalties and biases of a step's sequences, brought to the device before the step is launched."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tokenspeed_plan.plans.ops import ADJUSTMENTS
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.execution.executor import Executor
from tokenspeed_plan.runtime.execution.late_rows import LateRows
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
        self._row_of: dict[int, int] = {}
        self._entries = np.zeros((64, 3), dtype=np.int32)
        if params.repetition_penalty != 1:
            for token in prompt_ids:
                row = self._row(token)  # which may make a larger array
                self._entries[row, 1] = IN_PROMPT
        for token, bias in params.logit_bias:
            row = self._row(token)
            self._entries[row, 2] = np.float32(bias).view(np.int32)

    def _row(self, token_id: int) -> int:
        """The entry of a token; a new one counts nothing."""
        row = self._row_of.setdefault(token_id, len(self._row_of))
        if row == len(self._entries):
            self._entries = np.concatenate((self._entries, np.zeros_like(self._entries)))
        self._entries[row, 0] = token_id
        return row

    def add(self, token_id: int) -> None:
        """Count a token of the answer."""
        row = self._row(token_id)
        self._entries[row, 1] += IN_ANSWER

    def fill(self, words: np.ndarray, drafts: Iterable[int]) -> int:
        """Write its adjustments as the operator reads them.

        Args:
            words: of its row.
            drafts: tokens that the step counts itself; each has an entry for it.

        Returns:
            How many words are written.
        """
        new = [token for token in dict.fromkeys(drafts) if token not in self._row_of]
        number = max([len(self._row_of), *(1 + self._row(token) for token in new)])
        words[0] = number
        words[1 : 1 + 3 * number] = self._entries[:number].reshape(-1)
        for token in new:
            self._entries[self._row_of.pop(token)] = 0
        return 1 + 3 * number


class Adjustments:
    """Writes adjustments; nothing where the plan takes no penalties.

    Args:
        plan: says whether there are any.
        executor: of the steps.
    """

    def __init__(self, plan: Plan, executor: Executor) -> None:
        self._rows: LateRows | None = None
        if plan.takes_penalties:
            self._rows = LateRows(plan, executor, ADJUSTMENTS)

    def write(self, batch: Batch) -> None:
        """Send what is changed for each penalised sequence."""
        if self._rows is None:
            return
        for row, sequence in enumerate(batch.sequences):
            counts = sequence.counts
            if counts is not None and sequence.is_running and batch.makes_token(row):
                end = counts.fill(self._rows.words[row], batch.drafts_of(row))
                self._rows.send(row, row + 1, end)
