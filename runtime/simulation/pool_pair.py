"""A load on its way through two pools: one computes prompts, the other one answers.

What both decide is decided by the classes of `runtime/pools`, which the pools of a plan have, too:
which prompt is ordered when, what is reserved for it, what leaves with which step, which answers go
back, and who waits for whom. Each pool has a clock of its own, and goes on only when the other one
has come as far, so that it has heard all that was said before. Messages take no time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.output import OutputProcessor
from tokenspeed_plan.runtime.pools.caller import Caller
from tokenspeed_plan.runtime.pools.channel import Message
from tokenspeed_plan.runtime.pools.handovers import Handovers, PeerOptions
from tokenspeed_plan.runtime.pools.peers import Peer
from tokenspeed_plan.runtime.pools.prefill_server import PrefillServer
from tokenspeed_plan.runtime.request import Completion, Request
from tokenspeed_plan.runtime.scheduling.scheduler import Scheduler
from tokenspeed_plan.runtime.scheduling.sequence import Sequence
from tokenspeed_plan.runtime.simulation.load import Load
from tokenspeed_plan.runtime.simulation.load_results import PromptsComputed, Simulated
from tokenspeed_plan.runtime.simulation.one_pool import Look, OnePool, Progress
from tokenspeed_plan.runtime.simulation.virtual_link import Link, PushingLauncher, VirtualRanks
from tokenspeed_plan.runtime.simulation.virtual_steps import (
    StepTimes,
    VirtualClock,
    short_digests,
)
from tokenspeed_plan.runtime.step_loop import StepLoop

_LOOK_S = 0.002  # as an idle pool that answers looks who has waited long enough


@dataclass(frozen=True, slots=True)
class PairTimes:
    """What belongs to a pool of prompts beside the one that answers.

    Attributes:
        steps: what its steps take.
        there: how it reaches the other pool.
        back: how the other pool reaches it.
    """

    steps: StepTimes
    there: Link
    back: Link


@dataclass(slots=True)
class _Inbox:
    """What was said to a pool, by the time at which it was; `clock` is that of the pool."""

    clock: VirtualClock
    messages: deque[tuple[float, Message]] = field(default_factory=deque)

    @property
    def next_s(self) -> float:
        """When the next message comes, as far as is known; infinity where there is none."""
        return self.messages[0][0] if self.messages else math.inf

    def due(self) -> Iterator[Message]:
        """Take out what has come by now."""
        while self.next_s <= self.clock.now_s:
            yield self.messages.popleft()[1]


@dataclass(frozen=True, slots=True)
class _Outbox:
    """A line to another pool; `clock` is that of the pool that speaks."""

    clock: VirtualClock
    to: _Inbox

    def send(self, message: Message) -> None:
        """Say something now."""
        self.to.messages.append((self.clock.now_s, message))

    def close(self) -> None:
        """It is open until the end."""
        raise AssertionError("one pool of a simulation has left the other")


class _VirtualPeer(Peer):
    """The pool of prompts as the other one sees it."""

    def __init__(self, line: _Outbox, max_known: int) -> None:
        super().__init__(("", 0), max_known, 0.0)
        self._line = line
        self.heard_s = math.inf

    @property
    def is_usable(self) -> bool:
        """Always."""
        return True

    def post(self, message: Message) -> None:
        """Send a message."""
        self._line.send(message)


class _VirtualHandovers(Handovers):
    """The hand-overs of a pool that hears its peer when the clock has come so far."""

    def __init__(
        self, scheduler: Scheduler, plan: Plan, ranks: VirtualRanks, peer: Peer, inbox: _Inbox
    ) -> None:
        super().__init__(scheduler, plan, ranks, [peer], PeerOptions((), ""))
        self._peer = peer
        self._inbox = inbox

    def _handle_events(self, wait_s: float) -> None:
        for message in self._inbox.due():
            self._peer.num_heard += 1
            self._said(self._peer, message)


class _VirtualServer(PrefillServer):
    """The server of a pool that has one caller."""

    def __init__(
        self, engine: _PromptEngine, plan: Plan, ranks: VirtualRanks, inbox: _Inbox, line: _Outbox
    ) -> None:
        super().__init__(engine, plan, ranks, "")
        self._inbox = inbox
        self._caller = Caller(1, line)
        self._callers.append(self._caller)
        self._num_moves = 0

    @property
    def num_moves(self) -> int:
        """Changes whenever something was heard, computed or ended."""
        return self._num_moves + self._engine.loop.num_moves - len(self._jobs)

    def turn(self) -> None:
        """Do what was asked for by now, and a step."""
        for message in self._inbox.due():
            self._num_moves += 2  # one of them may be a job that has begun
            self._obey(self._caller, message)
        self._turn()


class _PromptEngine:
    """The engine of a pool of prompts, without a device.

    Args:
        plan: with that pool alone.
        launcher: starts its steps.
        clock: of the pool.
    """

    def __init__(self, plan: Plan, launcher: PushingLauncher, clock: VirtualClock) -> None:
        self.scheduler = Scheduler(plan, clock=clock)
        self.scheduler.cache.name_pages = short_digests
        self.loop = StepLoop(plan, launcher, self.scheduler, OutputProcessor(None))

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return self.scheduler.num_unfinished

    def add(self, request: Request) -> None:
        """Queue a request."""
        now_s = self.scheduler.clock()
        self.loop.add(Sequence(request, now_s, list(request.prompt_ids)))

    def cancel(self, request_id: str) -> bool:
        """Drop a request that waits or runs; False where there is none."""
        return self.loop.cancel(request_id)

    def step(self) -> list[Completion]:
        """Launch a step; returns the requests that finished."""
        return self.loop.step(None)


class _PromptPool:
    """The pool of prompts on its way.

    Args:
        plan: with both pools.
        times: of this pool.
        clock: of this pool.
        inbox: what the other pool says.
        line: to the other pool.
    """

    def __init__(
        self, plan: Plan, times: PairTimes, clock: VirtualClock, inbox: _Inbox, line: _Outbox
    ) -> None:
        pool = plan.pools[1]
        own = plan.model_copy(update={"pools": (pool,)})
        self.clock = clock
        self._inbox = inbox
        self._ranks = VirtualRanks(clock, times.there, pool.layout.num_ranks)
        self.launcher = PushingLauncher(own, times.steps, clock, self._ranks)
        self.engine = _PromptEngine(own, self.launcher, clock)
        self._server = _VirtualServer(self.engine, plan, self._ranks, inbox, line)
        self.launcher.announce = self._server.announce
        self._goes_on = False

    @property
    def next_s(self) -> float:
        """When it does something next; infinity where it waits for the other pool."""
        now_s = self.clock.now_s
        if self._goes_on:
            return now_s
        return max(min(self._inbox.next_s, self._ranks.next_s, free_s(self.clock)), now_s)

    def turn(self) -> None:
        """Wait for what comes next, and do it."""
        self.clock.wait_until(self.next_s)
        before = self._server.num_moves
        self._server.turn()
        self._goes_on = self._server.num_moves != before


class PoolPair(OnePool):
    """A load on its way through two pools; see `simulate`.

    Args:
        plan: what would be replayed, with both pools.
        times: what the steps of the pool that answers take.
        load: the requests.
        acceptance: see `VirtualLauncher`.
        seed: of the drafts that are accepted.
        every_step: go through each step for each sequence.
        pair: of the other pool.
    """

    def __init__(
        self,
        plan: Plan,
        times: StepTimes,
        load: Load,
        acceptance: Seq[float],
        seed: int,
        every_step: bool,
        pair: PairTimes,
    ) -> None:
        super().__init__(plan, times, load, acceptance, seed, every_step)
        own, other = self._clock, VirtualClock()
        self._inbox, there = _Inbox(own), _Inbox(other)
        peer = _VirtualPeer(_Outbox(own, there), plan.pools[1].limits.num_pages)
        self._ranks = VirtualRanks(own, pair.back, plan.pool.layout.num_ranks)
        peer.post({"type": "memory", "memory": self._ranks.descriptions})
        self._handovers = _VirtualHandovers(self._scheduler, plan, self._ranks, peer, self._inbox)
        self._loop.elsewhere = self._handovers
        self._prompts = _PromptPool(plan, pair, other, there, _Outbox(other, self._inbox))
        self._moves = -1  # before the last turn

    def run(self, progress: Progress | None, look: Look | None) -> Simulated:
        """Until nobody asks any more."""
        found, prompts = super().run(progress, look), self._prompts
        done = PromptsComputed(
            prompts.launcher.steps,
            prompts.engine.scheduler.metrics,
            self._handovers.counts,
            prompts.clock.busy_s,
        )
        return replace(found, prompts=done)

    def _has_work(self) -> bool:
        """Let the other pool come as far as this one, and take what has come by then."""
        if self._is_idle and self._arrival_s == math.inf:
            return False
        while self._prompts.next_s < self._next_s:
            self._prompts.turn()
        next_s = self._next_s
        assert next_s < math.inf, "both pools wait for each other"
        self._clock.wait_until(next_s)
        self._moves = self._num_moves
        self._take_arrivals()
        return True

    @property
    def _num_moves(self) -> int:
        """Rises with steps, with what is heard, and with prompts that it computes after all."""
        return self._loop.num_moves + self._handovers.counts.alone

    @property
    def _next_s(self) -> float:
        """When it does something next; infinity where it waits for the other pool."""
        now_s = self._clock.now_s
        if self._loop.in_flight is not None or self._num_moves != self._moves:
            return now_s
        look_s = now_s + _LOOK_S if self._handovers.is_open else math.inf
        known = (self._inbox.next_s, self._ranks.next_s, free_s(self._clock), self._arrival_s)
        return max(min(look_s, *known), now_s)

    def _rest(self) -> None:
        """Rest where the other pool has nothing for this one, and gets nothing from it."""
        if not self._scheduler.waiting and not self._handovers.is_open:
            super()._rest()


def free_s(clock: VirtualClock) -> float:
    """When a device will have done all that was launched; infinity where it has."""
    return clock.free_s if clock.free_s > clock.now_s else math.inf
