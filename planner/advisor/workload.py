"""The workload as a model: what a turn of a conversation asks for, and how turns share a pool.

Users are a closed loop: each has one turn under way, and starts the next when it is answered. With
an arrival rate, as many users are there as Little's law says, at most the concurrency.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from tokenspeed_plan.planner.spec import WorkloadSpec

# Tokens a step with 3 drafts: 3.39 (InferenceX's reference for this MTP head, thinking on; SGLang
# on GSM8K: 3.47). 1 + a + a^2 + a^3 = 3.39 gives a = 0.89.
ACCEPTANCE = (0.89,)


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn: its prompt, how much of it is in the cache, and the context in the middle of its answer."""

    prompt_tokens: float
    cached_tokens: float
    context_tokens: float

    @property
    def new_tokens(self) -> float:
        """What must be computed before the first token."""
        return self.prompt_tokens - self.cached_tokens


@dataclass(frozen=True, slots=True)
class Conversation:
    """The first turn, and the average of those after it (the first again where there is one alone)."""

    first: Turn
    later: Turn
    turns: int
    output_tokens: int

    def mean(self, of: Callable[[Turn], float]) -> float:
        """The average over all turns."""
        return (of(self.first) + (self.turns - 1) * of(self.later)) / self.turns

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that come from the cache."""
        return self.mean(lambda turn: turn.cached_tokens) / self.mean(
            lambda turn: turn.prompt_tokens
        )


def conversation(workload: WorkloadSpec, cached: bool = True) -> Conversation:
    """The turns of a workload.

    A turn finds its conversation's keys and values, and recurrent state where the last answer
    ended, if it is `cached`.
    """
    output, middle = workload.output_tokens, workload.turns / 2.0
    first = Turn(workload.first_turn_tokens, 0.0, workload.first_turn_tokens + output / 2)
    if workload.turns == 1:
        return Conversation(first, first, 1, output)
    before = workload.first_turn_tokens + (middle - 1.0) * workload.turn_tokens + middle * output
    found = before if cached else 0.0
    prompt = before + workload.turn_tokens
    return Conversation(first, Turn(prompt, found, prompt + output / 2), workload.turns, output)


def tokens_a_step(depth: int, acceptance: Sequence[float]) -> float:
    """Expected tokens of a step that verifies `depth` drafts: 1 + a1 + a1 a2 + ...

    A draft is accepted, with the share of its place, only if the one before it was; the last share
    holds for all places after it (Leviathan et al., arXiv:2211.17192, equation 1, where all are the
    same).
    """
    shares = [acceptance[min(place, len(acceptance) - 1)] for place in range(depth)]
    return 1.0 + math.fsum(accumulate(shares, mul))


@dataclass(frozen=True, slots=True)
class Demand:
    """What a turn asks of a pool.

    `prefill_us` of work in `chunks` pieces, then `steps` decode steps; `step_us` is a step's time
    by its batch. `prefill_parallelism` prompts are computed at once.
    """

    prefill_us: float
    chunks: float
    steps: float
    step_us: Callable[[float], float]
    prefill_parallelism: int = 1


@dataclass(frozen=True, slots=True)
class Served:
    """A turn as its user sees it, with `users` of them on a pool, `batch` decoding on average."""

    first_token_us: float
    decode_us: float
    users: float
    batch: float
    saturated: bool = False

    @property
    def turn_us(self) -> float:
        """From the request to the last token."""
        return self.first_token_us + self.decode_us


def serve(
    demand: Demand,
    concurrency: int,
    arrivals_per_s: float | None = None,
    handover_us: float | None = None,
) -> Served:
    """The steady state.

    `handover_us` is None where one pool does everything, else what stays exposed of moving a
    prompt's cache over.
    """

    def with_users(users: float) -> Served:
        return _shared(demand, users) if handover_us is None else _split(demand, users, handover_us)

    if arrivals_per_s is None:
        return with_users(float(concurrency))
    full = with_users(float(concurrency))
    if arrivals_per_s * full.turn_us * 1e-6 >= concurrency:
        return Served(full.first_token_us, full.decode_us, full.users, full.batch, saturated=True)
    low, high = 0.0, float(concurrency)
    for _ in range(40):
        users = (low + high) / 2.0
        too_few = arrivals_per_s * with_users(max(users, 1.0)).turn_us * 1e-6 > users
        low, high = (users, high) if too_few else (low, users)
    return with_users(max(high, 1.0))


def _shared(demand: Demand, users: float) -> Served:
    """One pool: while a user decodes, prompts of the others take the machine; while his prompt runs, their steps do.

    R is the turn that a user sees. In it each of the others computes one prompt, p. Of a decode
    phase of length D, the share (n - 1) p / R goes to them; during the own prompt, a step of the
    others comes after each chunk, and with probability of a prompt being under way it waits for
    half of one.
    """
    others = users - 1.0
    each_us = demand.prefill_us / demand.prefill_parallelism

    def phases(turn_us: float) -> tuple[float, float, float]:
        busy = min(others * each_us / turn_us, 0.999)
        decode_us, batch = 0.0, users
        for _ in range(4):
            decode_us = demand.steps * demand.step_us(max(batch, 1.0)) / (1.0 - busy)
            batch = users * min(decode_us / turn_us, 1.0)
        between = demand.chunks * demand.step_us(max(batch, 1.0)) * min(others, batch, 1.0)
        return demand.prefill_us * (1.0 + busy / 2.0) + between, decode_us, batch

    return _commit_state_len(phases, users * each_us, users)


def _split(demand: Demand, users: float, handover_us: float) -> Served:
    """Two pools: decode is never interrupted, prompts wait only for prompts."""
    others = users - 1.0
    each_us = demand.prefill_us / demand.prefill_parallelism

    def phases(turn_us: float) -> tuple[float, float, float]:
        busy = min(others * each_us / turn_us, 0.999)
        batch = users
        for _ in range(4):
            decode_us = demand.steps * demand.step_us(max(batch, 1.0))
            batch = users * min(decode_us / turn_us, 1.0)
        return (
            demand.prefill_us * (1.0 + busy / (2.0 * (1.0 - busy))) + handover_us,
            decode_us,
            batch,
        )

    return _commit_state_len(phases, users * each_us, users)


def _commit_state_len(
    phases: Callable[[float], tuple[float, float, float]], least_us: float, users: float
) -> Served:
    """The turn that is as long as its phases, by bisection; shorter ones crowd the pool, so the phases take longer.

    No turn is shorter than `least_us`, in which the pool computes everybody's prompt: a user waits
    for the rest of it.
    """
    low = max(least_us, 1e-3)
    high = 2.0 * low
    while sum(phases(high)[:2]) > high and high < 1e15:
        high *= 2.0
    for _ in range(50):
        middle = (low + high) / 2.0
        low, high = (middle, high) if sum(phases(middle)[:2]) > middle else (low, middle)
    first_us, decode_us, batch = phases(high)
    return Served(max(first_us, high - decode_us), decode_us, users, batch)
