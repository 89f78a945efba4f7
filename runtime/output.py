"""From step outputs to the tokens of a sequence, its finish reason and its completion.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenspeed_plan.plans.schema import Program
from tokenspeed_plan.runtime.request import Completion, FinishReason, NewToken, TokenLogprobs
from tokenspeed_plan.runtime.scheduling.sequence import Sequence
from tokenspeed_plan.runtime.streaming import StopSearch, text_before_stop
from tokenspeed_plan.runtime.tokenizer import Tokenizer

# Where logits are no numbers, the argmax is the first token.
FIRST_TOKEN = 0


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step computed for one sequence.

    Attributes:
        token_ids: new tokens.
        first_row: the row of the first one's logits among those of the step; the others' follow.
        drafts: those after the last one.
    """

    token_ids: list[int]
    first_row: int
    drafts: list[int]

    @property
    def rows(self) -> range:
        """The rows of its logits."""
        return range(self.first_row, self.first_row + len(self.token_ids))


def host_outputs(program: Program) -> tuple[str, ...]:
    """The buffers that the host reads after each replay."""
    names = [program.tokens]
    if program.query_len > 1:
        names.append("accepted")
    if program.depth:
        names.append(program.drafts)
    return tuple(names)


def step_output(program: Program, outputs: tuple[list[int], ...], index: int) -> StepOutput:
    """The part of one sequence.

    Args:
        program: the program of the step.
        outputs: the values of `host_outputs`.
        index: the sequence's place in the batch.
    """
    names = host_outputs(program)
    values = dict(zip(names, outputs, strict=True))
    num_accepted = 0
    if program.query_len > 1:
        num_accepted = values["accepted"][index]
    first = index * program.query_len
    end = first + 1 + num_accepted
    drafts: list[int] = []
    if program.depth:
        num_columns = program.depth + 1  # the first column is the token before the drafts
        start = index * num_columns
        drafts = values[program.drafts][start + 1 : start + num_columns]
    token_ids = values[program.tokens][first:end]
    return StepOutput(token_ids, first, drafts)


def token_logprobs(logits_V: Tensor, token_id: int, count: int) -> TokenLogprobs:
    """Logprobs of a token and of the `count` most likely ones, before temperature and filters."""
    logprobs_V = torch.log_softmax(logits_V.double(), -1)
    top = logprobs_V.topk(count)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    logprob = float(logprobs_V[token_id])
    return TokenLogprobs(token_id, logprob, tuple(pairs))


def _may_be_no_number(sequence: Sequence, output: StepOutput) -> bool:
    return (
        sequence.num_generated == 0
        or FIRST_TOKEN in output.token_ids
        or len(sequence.token_ids) + len(output.token_ids) >= sequence.max_len
        or sequence.request.params.num_logprobs is not None
    )


class OutputProcessor:
    """Adds new tokens to sequences and ends them.

    Args:
        tokenizer: for text and stop strings; without one, texts are empty.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def append_tokens(
        self, sequence: Sequence, output: StepOutput, logits_TV: Tensor
    ) -> list[NewToken]:
        """Add the tokens of a step, up to the one that ends the sequence; returns those added."""
        new_tokens: list[NewToken] = []
        for row, token_id in enumerate(output.token_ids, start=output.first_row):
            sequence.token_ids.append(token_id)
            logprobs = self._logprobs(sequence, token_id, logits_TV, row)
            new_token = NewToken(sequence.request.request_id, token_id, logprobs)
            new_tokens.append(new_token)
            sequence.finish_reason = self._finish_reason(sequence)
            if sequence.finish_reason:
                break
        return new_tokens

    def check_numbers(
        self, parts: Iterable[tuple[Sequence, StepOutput]], logits_TV: Tensor
    ) -> None:
        """Set the `error` of each sequence whose new tokens come from logits with NaN or infinity.

        NaN spreads through all layers and stays in the caches. So it shows in the first logits of a
        sequence, in its last ones, or in the token that an argmax over NaN gives. Only those are
        looked at, at once for all sequences, as it waits for the device.
        """
        suspects = [part for part in parts if _may_be_no_number(*part)]
        rows = [row for _, output in suspects for row in output.rows]
        if not rows:
            return
        is_finite = iter(torch.isfinite(logits_TV[rows]).all(-1).tolist())
        for sequence, output in suspects:
            found = [next(is_finite) for _ in output.rows]
            if not all(found):
                sequence.error = "the model's logits are not numbers"

    def completion(self, sequence: Sequence) -> Completion:
        """The answer of a sequence that has ended."""
        return Completion(
            request_id=sequence.request.request_id,
            token_ids=tuple(sequence.generated),
            text=self._final_text(sequence),
            finish_reason=sequence.finish_reason or "length",
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_cached_tokens=sequence.num_cached_tokens or 0,
            ttft_s=sequence.first_token_s - sequence.added_s,
            queue_s=sequence.started_s - sequence.added_s,
            decode_s=sequence.last_token_s - sequence.first_token_s,
            logprobs=tuple(sequence.logprobs),
        )

    def _final_text(self, sequence: Sequence) -> str:
        """The text before the stop token or the first stop string."""
        ids = sequence.generated
        if ids[-1] in sequence.stop_ids:
            ids = ids[:-1]
        if self._tokenizer is None:
            return ""
        return text_before_stop(self._tokenizer, ids, sequence.request.params.stop)

    def _logprobs(
        self, sequence: Sequence, token_id: int, logits_TV: Tensor, row: int
    ) -> TokenLogprobs | None:
        count = sequence.request.params.num_logprobs
        if count is None:
            return None
        logprobs = token_logprobs(logits_TV[row], token_id, count)
        sequence.logprobs.append(logprobs)
        return logprobs

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        if sequence.token_ids[-1] in sequence.stop_ids:
            return "stop"
        if sequence.request.params.stop and self._hits_stop(sequence):
            return "stop"
        if len(sequence.token_ids) == sequence.max_len:
            return "length"
        return None

    def _hits_stop(self, sequence: Sequence) -> bool:
        """Whether a stop string ends in the last token."""
        if self._tokenizer is None:
            return False
        if sequence.stop_search is None:
            stops = sequence.request.params.stop
            sequence.stop_search = StopSearch(self._tokenizer, stops)
        return sequence.stop_search.push(sequence.token_ids[-1])
