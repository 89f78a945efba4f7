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
    rows: range = range(0)  # of recurrent state, its own; the current one is `rows[turn]`
    turn: int = 0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def read_row(self) -> int:
        """The row with its state so far; one that has computed nothing reads the zero row."""
        return self.rows[self.turn] if self.num_computed else 0

    @property
    def write_row(self) -> int:
        """The row for its next state: another one, so that a kernel never writes what its neighbours still read."""
        return self.rows[(self.turn + 1) % len(self.rows)]

    def advance(self, count: int) -> None:
        """`count` more tokens are computed, the state that was written is the current one."""
        self.num_computed += count
        self.turn = (self.turn + 1) % len(self.rows)

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
