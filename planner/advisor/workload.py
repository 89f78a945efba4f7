"""The workload as a model: what a turn of a conversation asks for, and how users share a pool.

Users are a closed loop: each has one turn under way, and starts the next when it is answered. With
an arrival rate there are as many users as Little's law says, at most the concurrency.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from operator import attrgetter, mul

from tokenspeed_plan.planner.spec import WorkloadSpec

# A step with 3 drafts yields 3.39 tokens (InferenceX's reference for this MTP head, thinking on;
# SGLang on GSM8K: 3.47). 1 + a + a^2 + a^3 = 3.39 gives a = 0.89.
ACCEPTANCE = (0.89,)
MAX_BUSY = 0.999  # the largest share of the time for prompts, so that decode still gets some
BATCH_ROUNDS = 4  # after which the batch and the time of a step agree
ARRIVAL_ROUNDS = 40  # of bisection
TURN_ROUNDS = 50  # of bisection


@dataclass(frozen=True, slots=True)
class Turn:
    """Tokens of a turn: its prompt, the cached part, and the context in mid-answer."""

    prompt_tokens: float
    cached_tokens: float
    context_tokens: float

    @property
    def new_tokens(self) -> float:
        """Tokens that must be computed before the first one of the answer."""
        return self.prompt_tokens - self.cached_tokens


@dataclass(frozen=True, slots=True)
class Conversation:
    """The first turn, and the average of the later ones: the first too, if it is the only one."""

    first: Turn
    later: Turn
    turns: int
    output_tokens: float

    def mean(self, of: Callable[[Turn], float]) -> float:
        """The average over all turns."""
        num_later = self.turns - 1
        total = of(self.first) + num_later * of(self.later)
        return total / self.turns

    @property
    def where_answers_stay(self) -> Conversation:
        """The same for a pool that has the prompts alone: a later turn computes the last answer."""
        if self.turns == 1:
            return self
        cached_tokens = max(self.later.cached_tokens - self.output_tokens, 0.0)
        return replace(self, later=replace(self.later, cached_tokens=cached_tokens))

    @property
    def mean_context(self) -> int:
        """Tokens of context of an average decode step."""
        return round(self.mean(attrgetter("context_tokens")))

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that come from the cache."""
        cached = self.mean(attrgetter("cached_tokens"))
        return cached / self.mean(attrgetter("prompt_tokens"))


def conversation(workload: WorkloadSpec, cached: bool = True) -> Conversation:
    """The turns of a workload.

    Args:
        workload: the spec's.
        cached: a turn finds the keys, values and recurrent state of the turns before it.
    """
    output = _plain(workload.outputs.mean)
    first_prompt = _plain(workload.prompts.mean)
    # All rows but the first find what they share.
    first = Turn(first_prompt, float(workload.shared_tokens), first_prompt + output / 2)
    if workload.turns == 1:
        return Conversation(first, first, 1, output)
    middle = workload.turns / 2.0
    before = first_prompt + (middle - 1.0) * workload.turn_tokens + middle * output
    prompt = before + workload.turn_tokens
    cached_tokens = 0.0
    if cached:
        cached_tokens = before
    later = Turn(prompt, cached_tokens, prompt + output / 2)
    return Conversation(first, later, workload.turns, output)


def _plain(mean: float) -> float:
    """A whole number as one."""
    return int(mean) if mean == int(mean) else mean


def tokens_per_step(depth: int, acceptance: Sequence[float]) -> float:
    """Expected tokens of a step that verifies `depth` drafts: 1 + a1 + a1 a2 + ...

    A draft is accepted, with the share of its place, only if the one before it was. The last share
    holds for all places after it (Leviathan et al., arXiv:2211.17192, equation 1, where all shares
    are equal).
    """
    last = len(acceptance) - 1
    places = range(depth)
    shares = [acceptance[min(place, last)] for place in places]
    reached = accumulate(shares, mul)  # the shares of steps that accept each place
    return 1.0 + math.fsum(reached)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a turn asks of a pool.

    Attributes:
        prefill_us: time of the pool for the prompt.
        chunks: pieces in which the prompt is computed.
        tokens: of the answer, after the first: that one comes from the prompt's last chunk.
        step_us: microseconds of a decode step by its batch.
        token_us: microseconds of a token of a sequence by the batch; None for those of a step.
        prefill_parallelism: prompts that the pool computes at once.
        longest_wait_us: the most time of prompts between two decode steps, where that is limited.
        own_us: time of all steps that compute the prompt, where it shares them with others; None
            where it does not.
    """

    prefill_us: float
    chunks: float
    tokens: float
    step_us: Callable[[float], float]
    token_us: Callable[[float], float] | None = None
    prefill_parallelism: int = 1
    longest_wait_us: float = math.inf
    own_us: float | None = None

    @property
    def own_prompt_us(self) -> float:
        """Until the prompt is computed, if its steps come one after the other."""
        if self.own_us is None:
            return self.prefill_us
        return self.own_us

    def interleaved(self) -> Demand:
        """The same, where decode waits for one piece of a prompt at most."""
        return replace(self, longest_wait_us=self.prefill_us / self.chunks)

    def token_us_at(self, batch: float) -> float:
        """Microseconds of a token of a sequence at a batch, when nothing else happens."""
        return (self.token_us or self.step_us)(batch)

    def shared_token_us(self, batch: float, share: float) -> float:
        """The same, when decode gets a share of the pool: never longer than a step and the wait."""
        token_us, step_us = self.token_us_at(batch), self.step_us(batch)
        longest_us = token_us / step_us * (step_us + self.longest_wait_us)
        return min(token_us / share, longest_us)

    @property
    def prefill_share_us(self) -> float:
        """The pool's time for one prompt."""
        return self.prefill_us / self.prefill_parallelism


@dataclass(frozen=True, slots=True)
class TurnTime:
    """A turn as its user sees it.

    The pool has `users`, of whom `batch` decode on average. `saturated`: more turns arrive than the
    pool can answer.
    """

    first_token_us: float
    decode_us: float
    users: float
    batch: float
    saturated: bool = False

    @property
    def turn_us(self) -> float:
        """From the request to the last token."""
        return self.first_token_us + self.decode_us

    def later_by(self, waits_us: float) -> TurnTime:
        """The turn where the first token waits longer, while the pool does other work."""
        return replace(self, first_token_us=self.first_token_us + waits_us)


@dataclass(frozen=True, slots=True)
class _Phases:
    """The two parts of a turn, if it had a certain length."""

    first_token_us: float
    decode_us: float
    batch: float

    @property
    def turn_us(self) -> float:
        return self.first_token_us + self.decode_us


def serve(
    demand: Demand,
    concurrency: int,
    arrivals_per_s: float | None = None,
    handover_us: float | None = None,
) -> TurnTime:
    """The steady state of a pool.

    Args:
        demand: of each turn.
        concurrency: users at most.
        arrivals_per_s: turns that arrive; None where each user sends the next turn at once.
        handover_us: exposed time of moving a prompt's cache to the decode pool; None where one
            pool does everything.
    """
    everybody = _with_users(demand, float(concurrency), handover_us)
    if arrivals_per_s is None:
        return everybody
    if arrivals_per_s * everybody.turn_us * 1e-6 >= concurrency:
        return replace(everybody, saturated=True)
    low, high = 0.0, float(concurrency)
    for _ in range(ARRIVAL_ROUNDS):
        users = (low + high) / 2.0
        turn_s = _with_users(demand, max(users, 1.0), handover_us).turn_us * 1e-6
        if arrivals_per_s * turn_s > users:
            low = users
        else:
            high = users
    return _with_users(demand, max(high, 1.0), handover_us)


def _with_users(demand: Demand, users: float, handover_us: float | None) -> TurnTime:
    if handover_us is None:
        phases = partial(_shared, demand, users)
    else:
        phases = partial(_split, demand, users, handover_us)
    return _steady(demand, users, phases)


def _shared(demand: Demand, users: float, turn_us: float) -> _Phases:
    """One pool: prompts and decode steps of all users take turns on it.

    In a turn of length R, each of the other users computes one prompt, p. Of a decode phase of
    length D, the share (n - 1) p / R goes to them. During the user's own prompt, a decode step of
    the others comes after each chunk; and if another prompt is under way when the turn starts, it
    waits for half of one.
    """
    busy = _busy(demand, users, turn_us)
    decode_us, batch = _decode(demand, users, turn_us, 1.0 - busy)
    step_us = demand.step_us(max(batch, 1.0))
    others = min(users - 1.0, batch, 1.0)
    between_us = demand.chunks * step_us * others
    prompt_us = demand.own_prompt_us * (1.0 + busy / 2.0)
    return _Phases(prompt_us + between_us, decode_us, batch)


def _split(demand: Demand, users: float, handover_us: float, turn_us: float) -> _Phases:
    """Two pools: decode is never interrupted, and prompts wait only for prompts."""
    busy = _busy(demand, users, turn_us)
    decode_us, batch = _decode(demand, users, turn_us, 1.0)
    waiting = busy / (2.0 * (1.0 - busy))
    prompt_us = demand.prefill_us * (1.0 + waiting)
    return _Phases(prompt_us + handover_us, decode_us, batch)


def _busy(demand: Demand, users: float, turn_us: float) -> float:
    """The share of a turn in which the pool computes prompts of other users."""
    others = users - 1.0
    return min(others * demand.prefill_share_us / turn_us, MAX_BUSY)


def _decode(demand: Demand, users: float, turn_us: float, share: float) -> tuple[float, float]:
    """Microseconds of an answer that gets a share of the pool, and the batch that goes with it."""
    decode_us = 0.0
    batch = users
    for _ in range(BATCH_ROUNDS):
        decode_us = demand.tokens * demand.shared_token_us(max(batch, 1.0), share)
        decoding = min(decode_us / turn_us, 1.0)
        batch = users * decoding
    return decode_us, batch


def _steady(demand: Demand, users: float, phases: Callable[[float], _Phases]) -> TurnTime:
    """The turn whose length equals that of its phases, by bisection.

    The shorter a turn is assumed to be, the longer its phases are. No turn is shorter than the
    prompts of all users, which the pool computes one after the other; a user waits for the rest of
    that time.
    """
    low = max(users * demand.prefill_share_us, 1e-3)
    high = 2.0 * low
    while phases(high).turn_us > high and high < 1e15:
        high *= 2.0
    for _ in range(TURN_ROUNDS):
        middle = (low + high) / 2.0
        if phases(middle).turn_us > middle:
            low = middle
        else:
            high = middle
    final = phases(high)
    first_token_us = max(final.first_token_us, high - final.decode_us)
    return TurnTime(first_token_us, final.decode_us, users, final.batch)
