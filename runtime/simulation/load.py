"""Who asks what, and when: users with one conversation after the other, or recorded requests."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

from tokenspeed_plan.runtime.request import Completion, Request, SamplingParams

FILLER = 1  # the first token that no NaN gives


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that comes at a time, in seconds.

    `digests` are those of the first whole pages of its prompt, as far as they are known: of a later
    turn, those that the turn before had. Whoever answers it adds to them.
    """

    time_s: float
    request: Request
    digests: list[bytes] = field(default_factory=list)


class Load(Protocol):
    """Makes requests."""

    def next_time_s(self) -> float | None:
        """When the next request comes, as far as is known; None where none will."""

    def pop(self) -> Arrival:
        """The next request."""

    def answered(self, completion: Completion, now_s: float) -> None:
        """Take note of an answer: whoever waited for it goes on."""


@dataclass(frozen=True, slots=True)
class Turns:
    """Lengths of a conversation, in tokens: its first prompt, what each turn adds, each answer."""

    prompt: int
    added: int
    outputs: tuple[int, ...]


@dataclass(slots=True)
class _Talk:
    """A conversation under way."""

    turns: Turns
    token_ids: list[int]
    digests: list[bytes] = field(default_factory=list)
    num_done: int = 0


@dataclass
class Users:
    """Conversations, of which some run at once or begin at random times.

    Args:
        talks: the conversations, in their order.
        users: how many are held at once; None where they begin by `starts_per_s`.
        starts_per_s: conversations that begin in a second, at random (a Poisson process).
        think_s: from an answer to the next turn of its conversation.
        vocab_size: of the tokens.
        seed: of the times.
    """

    talks: Sequence[Turns]
    users: int | None
    starts_per_s: float = 0.0
    think_s: float = 0.0
    vocab_size: int = 1000
    seed: int = 0
    _due: list[tuple[float, int, _Talk]] = field(default_factory=list)
    _open: dict[str, _Talk] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._count = itertools.count()
        self._talks: Iterator[tuple[int, Turns]] = enumerate(self.talks)
        self._start_s = 0.0
        for _ in range(min(self.users or 1, len(self.talks))):
            self._begin_next(0.0)

    def next_time_s(self) -> float | None:
        """When the next turn comes, if one is known to come."""
        if not self._due:
            return None
        return self._due[0][0]

    def pop(self) -> Arrival:
        """The next turn; where conversations begin by themselves, another one is then due."""
        time_s, _, talk = heapq.heappop(self._due)
        if self.users is None and not talk.num_done:
            self._begin_next(time_s)
        name = f"sim-{next(self._count)}"
        self._open[name] = talk
        output = talk.turns.outputs[talk.num_done]
        request = Request(name, tuple(talk.token_ids), params_of(output))
        return Arrival(time_s, request, talk.digests)

    def answered(self, completion: Completion, now_s: float) -> None:
        """The user goes on after a while, or ends the conversation and begins another."""
        talk = self._open.pop(completion.request_id)
        talk.num_done += 1
        if talk.num_done < len(talk.turns.outputs):
            talk.token_ids += completion.token_ids
            talk.token_ids += [FILLER] * talk.turns.added
            self._push(now_s + self.think_s, talk)
        elif self.users is not None:
            self._begin_next(now_s)

    def _begin_next(self, now_s: float) -> None:
        number, turns = next(self._talks, (0, None))
        if turns is None:
            return
        if self.users is None:
            now_s += self._chance.expovariate(self.starts_per_s)
        self._push(now_s, _Talk(turns, own_tokens(number, turns.prompt, self.vocab_size)))

    def _push(self, time_s: float, talk: _Talk) -> None:
        heapq.heappush(self._due, (time_s, next(self._count), talk))


@cache
def params_of(output: int) -> SamplingParams:
    """For so many tokens; all such requests share them."""
    return SamplingParams(max_tokens=output, ignore_eos=True)


def own_tokens(number: int, count: int, vocab_size: int) -> list[int]:
    """A prompt that begins as no other does: with its number, the least digit first.

    What follows is alike: pages are known by all tokens before them, too.
    """
    digits = []
    while number:
        number, digit = divmod(number, vocab_size - 1)
        digits.append(FILLER + digit)
    return (digits + [FILLER] * count)[:count]
