"""Step outputs -> the tokens of a sequence, why it ends, and its completion. Shapes: V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenspeed_plan.plans.schema import Program
from tokenspeed_plan.runtime.request import Completion, FinishReason, NewToken, TokenLogprobs
from tokenspeed_plan.runtime.scheduling.sequence import Sequence
from tokenspeed_plan.runtime.tokenizer import Tokenizer

# A stop string may begin inside a token; so many tokens more than it has bytes are looked at.
STOP_WINDOW_MARGIN = 4


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step computed for one sequence: tokens, their logits, and drafts after them."""

    token_ids: list[int]
    logits: Tensor
    drafts: list[int]


def host_outputs(program: Program) -> tuple[str, ...]:
    """The buffers that the host reads after each replay."""
    names = [program.tokens]
    if program.query_len > 1:
        names.append("accepted")
    if program.depth:
        names.append(program.drafts)
    return tuple(names)


def step_output(
    program: Program, outputs: tuple[list[int], ...], logits: Tensor, index: int
) -> StepOutput:
    """The part of the sequence at `index` of a batch; `outputs` are those of `host_outputs`."""
    found = dict(zip(host_outputs(program), outputs, strict=True))
    first = index * program.query_len
    num_accepted = found["accepted"][index] if program.query_len > 1 else 0
    end = first + 1 + num_accepted
    drafts: list[int] = []
    if program.depth:
        row_size = program.depth + 1  # the first column is the token before the drafts
        drafts = found[program.drafts][index * row_size + 1 : (index + 1) * row_size]
    return StepOutput(found[program.tokens][first:end], logits[first:end], drafts)


def token_logprobs(logits_V: Tensor, token_id: int, count: int) -> TokenLogprobs:
    """Logprobs of a token and of the `count` best, over the whole vocabulary, before temperature."""
    logprobs_V = torch.log_softmax(logits_V.double(), -1)
    top = logprobs_V.topk(count)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return TokenLogprobs(token_id, float(logprobs_V[token_id]), tuple(pairs))


class OutputProcessor:
    """Adds new tokens to sequences and ends them.

    Args:
        tokenizer: for text and stop strings; without one, texts are empty.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def append_tokens(self, sequence: Sequence, output: StepOutput) -> list[NewToken]:
        """Add the tokens of a step, up to the one that ends the sequence; returns those added."""
        new_tokens: list[NewToken] = []
        for token_id, logits_V in zip(output.token_ids, output.logits, strict=False):
            sequence.token_ids.append(token_id)
            logprobs = self._logprobs(sequence, token_id, logits_V)
            new_tokens.append(NewToken(sequence.request.request_id, token_id, logprobs))
            sequence.finish_reason = self._finish_reason(sequence)
            if sequence.finish_reason:
                break
        return new_tokens

    def completion(self, sequence: Sequence) -> Completion:
        """The answer of a sequence that has ended; its text has no stop token and no stop string."""
        ids = sequence.generated
        text = self._text(ids[:-1] if ids[-1] in sequence.stop_ids else ids)
        cuts = [text.find(stop) for stop in sequence.request.params.stop if stop in text]
        if cuts:
            text = text[: min(cuts)]
        return Completion(
            request_id=sequence.request.request_id,
            token_ids=tuple(ids),
            text=text,
            finish_reason=sequence.finish_reason or "length",
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_cached_tokens=sequence.num_cached_tokens or 0,
            ttft_s=sequence.first_token_s - sequence.added_s,
            decode_s=sequence.last_token_s - sequence.first_token_s,
            logprobs=tuple(sequence.logprobs),
        )

    def _logprobs(
        self, sequence: Sequence, token_id: int, logits_V: Tensor
    ) -> TokenLogprobs | None:
        count = sequence.request.params.num_logprobs
        if count is None:
            return None
        logprobs = token_logprobs(logits_V, token_id, count)
        sequence.logprobs.append(logprobs)
        return logprobs

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        if sequence.token_ids[-1] in sequence.stop_ids:
            return "stop"
        if sequence.request.params.stop and self._hits_stop(sequence):
            return "stop"
        return "length" if len(sequence.token_ids) == sequence.max_len else None

    def _hits_stop(self, sequence: Sequence) -> bool:
        """Whether a stop string ends in the last token; it spans at most one token a byte."""
        stops = sequence.request.params.stop
        window = max(len(stop.encode()) for stop in stops) + STOP_WINDOW_MARGIN
        tail = self._text(sequence.generated[-window:])
        return any(stop in tail for stop in stops)

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids) if self._tokenizer else ""
