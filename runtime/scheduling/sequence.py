"""One request in progress: what is computed, the memory it holds, what it has generated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from tokenspeed_plan.runtime.cache.prefix_tree import Node
from tokenspeed_plan.runtime.grammars.matcher import Matcher
from tokenspeed_plan.runtime.request import FinishReason, Request, TokenLogprobs
from tokenspeed_plan.runtime.streaming import StopSearch

State = Literal["waiting", "prefilling", "decoding", "preempted", "finished", "cancelled"]

# What may come after each state; there is no other way to change one.
TRANSITIONS: Mapping[State, frozenset[State]] = {
    "waiting": frozenset({"prefilling", "decoding", "cancelled"}),
    "prefilling": frozenset({"decoding", "preempted", "cancelled"}),
    "decoding": frozenset({"preempted", "finished", "cancelled"}),
    "preempted": frozenset({"prefilling", "decoding", "cancelled"}),
    "finished": frozenset(),
    "cancelled": frozenset(),
}


class Counts(Protocol):
    """Counts the tokens of a sequence."""

    def add(self, token_id: int) -> None:
        """Count a token of the answer."""

    def fill(self, words: np.ndarray, drafts: Iterable[int]) -> int:
        """Write its adjustments; returns how many words they have."""


class IllegalTransition(AssertionError):
    """A state that cannot come after the present one."""


@dataclass(slots=True, eq=False)
class Sequence:
    """Progress of a request. `num_computed` tokens of it are in the caches.

    It holds its `pages`, its `state_slot` (0 for none) and its `own_slots`, which the next steps
    write and nobody else holds; pages and `state_slot` may be shared. Where a plan writes states in
    place, `own_slots` is `state_slot` itself unless that is shared. The state is that after the
    computed tokens, less the last `num_kept`, whose inputs are kept in the slot. `node` is the last
    of its pages that the prefix cache knows.
    """

    request: Request
    added_s: float
    token_ids: list[int] = field(default_factory=list)  # prompt and generated
    state: State = "waiting"
    number: int = 0  # in order of arrival
    num_computed: int = 0
    num_kept: int = 0
    pages: list[int] = field(default_factory=list)
    # rises when pages or state slots are not as the last step left them, but for pages at the end
    pages_version: int = 0
    state_slot: int = 0
    own_slots: list[int] = field(default_factory=list)
    # launched for it and not committed: tokens, drafts included, and steps
    num_ahead: int = 0
    steps_ahead: int = 0
    # up to so many known tokens a step may be launched before the last one is committed
    ready_len: int = -1
    # another pool computes its prompt, or the host has its beginning, and it is on its way
    is_elsewhere: bool = False
    # its logits need no look but where a step may make its last token: see `note_token`
    is_quiet: bool = False
    # nor does the host do anything with its next token but look at its stop ids and its length
    is_plain: bool = False
    # after the last token, to be verified; there may be none
    drafts: list[int] = field(default_factory=list)
    stop_ids: frozenset[int] = frozenset()  # tokens that end it
    node: Node | None = None
    digests: list[bytes] = field(default_factory=list)  # of its whole pages, chained
    # positions where others will want a checkpoint
    checkpoint_requests: set[int] = field(default_factory=set)
    # page to be copied before its next step to the one where it goes on
    copy_from: int | None = None
    # of the prompt, found in the cache when it was first admitted
    num_cached_tokens: int | None = None
    started_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    finish_reason: FinishReason | None = None
    error: str | None = None  # why it fails, where it does
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    stop_search: StopSearch | None = None  # where it has stop strings and a token
    matcher: Matcher | None = None  # after its tokens, where it has a grammar
    counts: Counts | None = None  # of its tokens, where it has penalties or biases
    num_prompt_tokens: int = field(init=False)
    max_len: int = field(init=False)  # tokens that it can have at most

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.request.prompt_ids)
        self.max_len = self.num_prompt_tokens + self.request.params.max_tokens

    def move_to(self, state: State) -> None:
        """Change the state.

        Raises:
            IllegalTransition: the table has no such step.
        """
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransition(
                f"request `{self.request.request_id}` cannot go from {self.state} to {state}"
            )
        self.state = state

    def note_token(self, now_s: float) -> None:
        """Note when its last token came; the first one sets the time to the first token.

        After the first one most requests want nothing but tokens.
        """
        self.first_token_s = self.first_token_s or now_s
        self.last_token_s = now_s
        params = self.request.params
        self.is_quiet = not params.stop and params.num_logprobs is None
        self.is_plain = self.is_quiet and not self.must_be_read

    def take_plain(self, token_id: int, now_s: float) -> None:
        """Take a token that a step without drafts has made, and nothing else.

        It continues from the state slot that was written; the one before it is written next.
        """
        self.token_ids.append(token_id)
        self.num_computed += 1
        self.num_ahead -= 1
        self.steps_ahead -= 1
        self.last_token_s = now_s
        own_slots = self.own_slots
        self.state_slot, own_slots[0] = own_slots[0], self.state_slot

    def launch(self, count: int) -> None:
        """Note that a step computes `count` more tokens of it."""
        self.num_ahead += count
        self.steps_ahead += 1

    def land(self, count: int) -> None:
        """Note that this step is over."""
        self.num_ahead -= count
        self.steps_ahead -= 1

    def forget_memory(self) -> None:
        """Hold nothing any more, after all was given back."""
        self.pages = []
        self.own_slots = []
        self.state_slot = 0
        self.node = None
        self.num_computed = 0
        self.ready_len = -1
        self.copy_from = None
        self.drafts = []
        self.checkpoint_requests.clear()

    @property
    def must_be_read(self) -> bool:
        """Whether the host makes inputs of a step from the tokens of the one before."""
        return self.matcher is not None or self.counts is not None

    @property
    def is_scored(self) -> bool:
        """Whether the logprobs of its prompt are wanted, and not all known."""
        wanted = self.request.params.prompt_logprobs is not None
        return wanted and len(self.prompt_logprobs) < self.num_prompt_tokens - 1

    @property
    def is_running(self) -> bool:
        """Whether it holds memory."""
        return self.state in ("prefilling", "decoding")

    @property
    def generated(self) -> list[int]:
        """The tokens after its prompt."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_generated(self) -> int:
        """Tokens after its prompt."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_left(self) -> int:
        """Known tokens that are not computed yet."""
        return len(self.token_ids) - self.num_computed

    @property
    def state_len(self) -> int:
        """Tokens that its recurrent state has seen."""
        return self.num_computed - self.num_kept

    @property
    def next_phase(self) -> State:
        """A sequence with one token left, and a state to go on from, decodes; others prefill."""
        if self.num_left == 1 and self.state_slot:
            return "decoding"
        return "prefilling"

    def chunk_end(self, max_tokens: int, interval: int) -> int:
        """Where its next chunk ends: at the next checkpoint, if it comes to one.

        A rest of at most `interval` tokens is not cut at a checkpoint of the plan: a second step
        would cost more than the checkpoint saves. Where the logprobs of its prompt are wanted, a
        chunk is one token: a step has logits after the last token of each sequence alone.

        Args:
            max_tokens: longest chunk.
            interval: tokens from one checkpoint of the plan to the next.
        """
        start = self.num_computed
        if self.is_scored:
            return start + 1
        num_known = len(self.token_ids)
        end = min(start + max_tokens, num_known)
        if num_known - start > interval:
            next_checkpoint = (start // interval + 1) * interval
            end = min(end, next_checkpoint)
        for position in self.checkpoint_requests:
            if start < position < end:
                end = position
        return end
