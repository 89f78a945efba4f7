"""A step that was launched and is not committed, and what the host wants of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenspeed_plan.runtime.execution.launch import HostValues
from tokenspeed_plan.runtime.output import Look
from tokenspeed_plan.runtime.scheduling.batch import Batch


@dataclass(slots=True)
class InFlightBatch:
    """A batch that was launched.

    `outputs` waits for its tokens, how many drafts were accepted, and new drafts; None while only
    the head of its program is launched. `look` is what is wanted of its logits; it is taken before
    another step `is_followed` by overwrites them. Sequences whose places are in `advanced` stay
    inside their prompts: they were committed when it was launched.
    """

    batch: Batch
    outputs: HostValues | None
    logits: Tensor
    tokens: Tensor
    look: Look | None = None
    is_followed: bool = False
    advanced: frozenset[int] = frozenset()

    def take_look(self, indices: list[int]) -> None:
        """Look at the logits of some of its sequences."""
        queries = self.batch.program.query_len
        rows, num_logprobs = list[int](), dict[int, int]()
        wanted = dict[int, int]()
        for index in indices:
            mine = range(index * queries, (index + 1) * queries)
            rows += mine
            sequence = self.batch.sequences[index]
            count = sequence.request.params.num_logprobs
            if self.scores(index):
                count = sequence.request.params.prompt_logprobs
                wanted[mine.start] = sequence.token_ids[sequence.num_computed + 1]
            if count is not None:
                num_logprobs |= dict.fromkeys(mine, count)
        if rows:
            self.look = Look(self.logits, self.tokens, rows, num_logprobs, wanted)

    def scores(self, index: int) -> bool:
        """Whether the logits of a sequence, before it is committed, are for the prompt's own token.

        Those before a place that is known already are computed again after a preemption.
        """
        sequence = self.batch.sequences[index]
        place = len(sequence.prompt_logprobs)
        return sequence.is_scored and sequence.num_computed == place
