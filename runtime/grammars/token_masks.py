"""The masks of a step's constrained sequences, brought to the device before the step is launched.

Shapes: S sequences, R queries of each, W words of the mask of one query.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from tokenspeed_plan.plans.ops import TOKEN_MASK, mask_words
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.execution.executor import Executor
from tokenspeed_plan.runtime.execution.late_rows import LateRows
from tokenspeed_plan.runtime.grammars.matcher import fill_ahead
from tokenspeed_plan.runtime.scheduling.batch import Batch

FEW = 4  # rows that one thread fills sooner than several
THREADS = 8


class TokenMasks:
    """Writes masks; nothing where the plan takes no grammars.

    Args:
        plan: says whether there are masks, and for how many queries.
        executor: of the steps.
    """

    def __init__(self, plan: Plan, executor: Executor) -> None:
        self._rows: LateRows | None = None
        if plan.takes_grammars:
            self._rows = LateRows(plan, executor, TOKEN_MASK)
            words = self._rows.words
            self._mask_SRW = words.reshape(len(words), -1, mask_words(plan.model.vocab_size))
            self._threads = ThreadPoolExecutor(THREADS, "masks")

    def write(self, batch: Batch) -> None:
        """Send what the next tokens of each constrained sequence may be."""
        if self._rows is None:
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
        self._rows.send(rows[0], rows[-1] + 1)

    def _fill(self, batch: Batch, row: int) -> None:
        """The masks of one sequence."""
        matcher = batch.sequences[row].matcher
        assert matcher is not None
        fill_ahead(matcher, self._mask_SRW[row], batch.drafts_of(row))
