"""What a caller asks of the engine, and what it gets back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from tokenspeed_plan.plans.errors import RequestFailed
from tokenspeed_plan.runtime.grammars.matcher import Grammar

# A cancelled request has no completion; one that failed has an `error` in place of an answer.
FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when to stop.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 switch the filters off. With a `seed` the
    tokens of a request depend on nothing but the request. `num_logprobs` None returns no logprobs,
    n returns the chosen token's and the n most likely ones.

    Penalties and biases change logits as in vLLM: `presence_penalty` and `frequency_penalty` of
    tokens in the answer so far, `repetition_penalty` (1 for none) also of those in the prompt;
    `logit_bias` has pairs of a token and what is added to it. `min_p` drops tokens that are less
    likely than so much of the most likely one. `prompt_logprobs` n is `num_logprobs` of the tokens
    of the prompt after its first; such a prompt is computed token by token, and nothing of it is
    taken from the prefix cache.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    prompt_logprobs: int | None = None

    @property
    def penalises(self) -> bool:
        """Whether logits depend on tokens that were there before, or are given a bias."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1)
        return any(penalties) or bool(self.logit_bias)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue; with a `grammar`, as it allows."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities.

    `logprob` is that of the chosen token; `top` has the most likely tokens as (token id, logprob),
    the most likely first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class NewToken(NamedTuple):
    """A token of an unfinished request; the last token comes only with the `Completion`."""

    request_id: str
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request.

    `token_ids` holds every generated token, a stop token included; `text` ends before the stop
    token or stop string. `ttft_s` runs from `Engine.add` to the first token, and `queue_s` of it
    until the request starts; `decode_s` runs from the first token to the last. `num_cached_tokens`
    of the prompt came from the prefix cache. `prompt_logprobs` are those of the prompt's tokens
    after its first, where they were asked for. `error` says why there is no answer, where the
    finish reason is `error`.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    num_prompt_tokens: int
    ttft_s: float
    decode_s: float
    logprobs: tuple[TokenLogprobs, ...] = field(default=())
    num_cached_tokens: int = 0
    error: str | None = None
    queue_s: float = 0.0
    prompt_ids: tuple[int, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    def check(self) -> None:
        """Refuse to go on with an answer that there is not.

        Raises:
            RequestFailed: the request has failed.
        """
        if self.error is not None:
            raise RequestFailed(
                self.error, "others go on; if it comes again, check the model's weights"
            )


def failed(request: Request, error: str) -> Completion:
    """The completion of a request that has failed."""
    return Completion(
        request_id=request.request_id,
        token_ids=(),
        text="",
        finish_reason="error",
        num_prompt_tokens=len(request.prompt_ids),
        ttft_s=0.0,
        decode_s=0.0,
        error=error,
    )
