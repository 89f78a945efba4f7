"""From step outputs to the tokens of a sequence, its finish reason and its completion.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenspeed_plan.plans.schema import Program
from tokenspeed_plan.runtime.execution.host_copy import HostCopy, index_on
from tokenspeed_plan.runtime.request import Completion, FinishReason, NewToken, TokenLogprobs
from tokenspeed_plan.runtime.scheduling.sequence import Sequence
from tokenspeed_plan.runtime.streaming import StopSearch, text_before_stop
from tokenspeed_plan.runtime.tokenizer import Tokenizer

# Where logits are no numbers, the argmax is the first token.
FIRST_TOKEN = 0
NO_NUMBERS = "the model's logits are not numbers"
NO_TOKEN = "no token can follow in the form that was asked for"


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
    query_len = program.query_len
    if query_len == 1 and not program.depth:
        return StepOutput([outputs[0][index]], index, [])
    values = dict(zip(host_outputs(program), outputs, strict=True))
    num_accepted = 0
    if query_len > 1:
        num_accepted = values["accepted"][index]
    first = index * query_len
    end = first + 1 + num_accepted
    drafts: list[int] = []
    if program.depth:
        num_columns = program.depth + 1  # the first column is the token before the drafts
        start = index * num_columns
        drafts = values[program.drafts][start + 1 : start + num_columns]
    token_ids = values[program.tokens][first:end]
    return StepOutput(token_ids, first, drafts)


def needs_look(sequence: Sequence, count: int) -> bool:
    """Whether a step of `count` tokens may make its first token, its last, or one with logprobs.

    Args:
        sequence: with what is known before the step is committed.
        count: tokens that the step computes of it, drafts included.
    """
    return not sequence.is_quiet or len(sequence.token_ids) + count >= sequence.max_len


class Look:
    """What the host wants of the logits of a step, beside its tokens.

    It is taken before the next step writes other logits, and read later.

    Args:
        logits_TV: the logits of the step.
        tokens_T: the tokens that were sampled from them.
        rows: which of them are looked at.
        num_logprobs: for those rows whose logprobs are wanted, how many of the most likely tokens.
        wanted: of some of these rows another token than the one that was sampled.
    """

    def __init__(
        self,
        logits_TV: Tensor,
        tokens_T: Tensor,
        rows: list[int],
        num_logprobs: dict[int, int],
        wanted: dict[int, int],
    ) -> None:
        self._place = {row: place for place, row in enumerate(rows)}
        self._num_logprobs = num_logprobs
        self._reported = {row: place for place, row in enumerate(num_logprobs)}
        device = logits_TV.device
        parts = [torch.isfinite(logits_TV[index_on(device, rows)]).all(-1)]
        if num_logprobs:
            index = index_on(device, [*num_logprobs])
            logprobs_NV = torch.log_softmax(logits_TV[index].double(), -1)
            tokens_N = tokens_T.flatten()[index].long()
            if wanted:
                own_N = index_on(device, [wanted.get(row, -1) for row in num_logprobs])
                tokens_N = own_N.where(own_N >= 0, tokens_N)
            tokens_N1 = tokens_N.unsqueeze(1)
            top = logprobs_NV.topk(max(num_logprobs.values()))
            parts += [logprobs_NV.gather(1, tokens_N1), top.indices, top.values]
        self._copy = HostCopy(*parts)
        self._read: list[list[Any]] = []

    def _values(self) -> list[list[Any]]:
        if not self._read:
            self._read = [tensor.tolist() for tensor in self._copy.wait()]
        return self._read

    def has(self, row: int) -> bool:
        """Whether this row is looked at."""
        return row in self._place

    def is_finite(self, row: int) -> bool:
        """Whether all logits of a row are numbers."""
        return bool(self._values()[0][self._place[row]])

    def logprobs(self, row: int, token_id: int) -> TokenLogprobs | None:
        """Of a row's token and of the most likely ones, before temperature and filters."""
        if row not in self._reported:
            return None
        _, own, ids, values = self._values()
        place, count = self._reported[row], self._num_logprobs[row]
        top = zip(ids[place][:count], values[place][:count], strict=True)
        return TokenLogprobs(token_id, own[place][0], tuple(top))


class OutputProcessor:
    """Adds new tokens to sequences and ends them.

    Args:
        tokenizer: for text and stop strings; without one, texts are empty.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def append_tokens(
        self, sequence: Sequence, output: StepOutput, look: Look | None
    ) -> list[NewToken]:
        """Add the tokens of a step, up to the one that ends the sequence; returns those added."""
        new_tokens: list[NewToken] = []
        for row, token_id in enumerate(output.token_ids, start=output.first_row):
            if sequence.matcher is not None and not sequence.matcher.accept(token_id):
                sequence.error = NO_TOKEN
                break
            if sequence.counts is not None:
                sequence.counts.add(token_id)
            sequence.token_ids.append(token_id)
            logprobs = None
            if sequence.request.params.num_logprobs is not None and look is not None:
                logprobs = look.logprobs(row, token_id)
            if logprobs is not None:
                sequence.logprobs.append(logprobs)
            new_token = NewToken(sequence.request.request_id, token_id, logprobs)
            new_tokens.append(new_token)
            sequence.finish_reason = self._finish_reason(sequence)
            if sequence.finish_reason:
                break
        return new_tokens

    def check_numbers(self, parts: Iterable[tuple[Sequence, StepOutput]], look: Look) -> None:
        """Set the `error` of each sequence whose new tokens come from logits with NaN or infinity.

        NaN spreads through all layers and stays in the caches. So it shows in the first logits of a
        sequence, in its last ones, or in the token that an argmax over NaN gives. Only those are
        looked at.
        """
        for sequence, output in parts:
            rows = [row for row in output.rows if look.has(row)]
            if not all(map(look.is_finite, rows)):
                sequence.error = NO_NUMBERS

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
            prompt_ids=sequence.request.prompt_ids,
            prompt_logprobs=tuple(sequence.prompt_logprobs),
        )

    def _final_text(self, sequence: Sequence) -> str:
        """The text before the stop token or the first stop string."""
        ids = sequence.generated
        if ids[-1] in sequence.stop_ids:
            ids = ids[:-1]
        if self._tokenizer is None:
            return ""
        return text_before_stop(self._tokenizer, ids, sequence.request.params.stop)

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
