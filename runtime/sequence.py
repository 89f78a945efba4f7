"""One request on its way: what is computed, where its state lies, what it has said."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenspeed_plan.runtime.request import FinishReason, Request, TokenLogprobs


@dataclass(slots=True)
class Sequence:
    """Progress of a request. `num_computed` tokens of it are in the caches."""

    request: Request
    added_s: float
    token_ids: list[int] = field(default_factory=list)  # prompt and generated
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    row: int = 0  # of recurrent state; 0 until admitted
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def generated(self) -> list[int]:
        """What it has said."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_prefilling(self) -> bool:
        """Whether some of its prompt is not computed yet."""
        return self.num_computed < self.num_prompt_tokens

    @property
    def longest(self) -> int:
        """Tokens that it can come to."""
        return self.num_prompt_tokens + self.request.params.max_tokens
