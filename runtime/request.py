"""What a caller asks of the engine, and what it gets back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tokenspeed_plan.plans.errors import RequestError

FinishReason = Literal["stop", "length", "cancelled"]  # a cancelled request has no completion


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when to stop.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 switch the filters off. With a `seed` the
    tokens of a request depend on nothing but the request. `num_logprobs` None returns no logprobs,
    n returns the chosen token's and the n most likely ones.
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

    def check(self, vocab_size: int) -> None:
        """Refuse what no kernel could carry out.

        Raises:
            RequestError: a number is out of its range.
        """
        num_logprobs = self.num_logprobs or 0
        ranges = (
            ("max_tokens", self.max_tokens >= 1, "at least one"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and up to 1"),
            ("top_k", 0 <= self.top_k < 1 << 31, "0 or more, in 32 bits"),
            ("num_logprobs", 0 <= num_logprobs <= vocab_size, f"0 to {vocab_size}"),
        )
        for name, holds, wanted in ranges:
            if not holds:
                value = getattr(self, name)
                raise RequestError(f"{name} is {value}", f"it must be {wanted}")


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams = SamplingParams()


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities.

    `logprob` is that of the chosen token; `top` has the most likely tokens as (token id, logprob),
    the most likely first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token of an unfinished request; the last token comes only with the `Completion`."""

    request_id: str
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request.

    `token_ids` holds every generated token, a stop token included; `text` ends before the stop
    token or stop string. `ttft_s` runs from `Engine.add` to the first token, `decode_s` from the
    first token to the last. `num_cached_tokens` of the prompt came from the prefix cache.
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
