"""What one pool would send to another, on its clock: the bytes, and when they are there.

A rank pushes layer by layer while a step computes, as `planner/advisor/transfer.py` prices it: each
layer's part leaves when that is computed and the link is free. Ranks do so side by side, so that
one of them stands for all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.execution.bound_programs import Part
from tokenspeed_plan.runtime.pools.pool_rank import Move, RankOrder
from tokenspeed_plan.runtime.pools.rank_reports import MAX_JOBS
from tokenspeed_plan.runtime.pools.transport import Sending
from tokenspeed_plan.runtime.scheduling.batch import Batch
from tokenspeed_plan.runtime.simulation.virtual_steps import (
    StepTimes,
    VirtualClock,
    VirtualLauncher,
)

_DIGEST = ""  # of all that is handed over, as no byte of it exists


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """What a rank sends of a layer: keys and values of each page, and a state."""

    page_bytes: int
    state_bytes: int


@dataclass(frozen=True, slots=True)
class Link:
    """How a rank of a pool reaches another pool.

    Attributes:
        layers: of the rank, in the order in which a step computes them, in equal parts of its time.
        bytes_per_s: of the rank, in one direction.
        handshake_us: until the first byte leaves, and again after the last one is there.
    """

    layers: tuple[LayerBytes, ...]
    bytes_per_s: float
    handshake_us: float


@dataclass(slots=True)
class _Name:
    """A transport by its name alone."""

    name: str = "virtual"
    settle_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Moment:
    """When the device has done what was launched before."""

    clock: VirtualClock
    at_s: float

    def query(self) -> bool:
        """Whether the host has come to that moment."""
        return self.clock.now_s >= self.at_s


@dataclass(slots=True)
class _Sent:
    """A hand-over: when all of it that was sent is there, and whether nothing comes after it."""

    end_s: float = 0.0
    is_over: bool = False


class VirtualRanks:
    """The ranks of a pool, as `PoolRanks` has them, without memory.

    Args:
        clock: of the pool.
        link: to the other pool.
        num_ranks: of the pool.
    """

    def __init__(self, clock: VirtualClock, link: Link, num_ranks: int) -> None:
        self.transport: Sending = _Name()
        self.descriptions: list[dict[str, Any]] = [{}] * num_ranks
        self.page_bytes = num_ranks * sum(layer.page_bytes for layer in link.layers)
        self.state_bytes = num_ranks * sum(layer.state_bytes for layer in link.layers)
        self._clock = clock
        self._link = link
        self._handshake_s = link.handshake_us * 1e-6
        self._free_s = 0.0
        self._numbers = itertools.count(1)
        self._sent: dict[int, _Sent] = {}
        self._next: list[Move] = []

    @property
    def is_full(self) -> bool:
        """Whether there is no place for another hand-over."""
        return len(self._sent) == MAX_JOBS

    @property
    def next_s(self) -> float:
        """When the next hand-over is over; infinity where none is under way."""
        now_s = self._clock.now_s
        ends = (each.end_s for each in self._sent.values() if each.is_over)
        return min((end_s for end_s in ends if end_s > now_s), default=math.inf)

    def begin(self) -> int:
        """The number of a new hand-over."""
        number = next(self._numbers)
        self._sent[number] = _Sent()
        return number

    def forget(self, job: int) -> None:
        """Know nothing more of a hand-over."""
        self._sent.pop(job, None)

    def do(self, order: RankOrder) -> None:
        """Send what is there already, or note what leaves with the next step."""
        match order["do"]:
            case "next":
                self._next = [Move(**move) for move in order["moves"]]
            case "push":
                begin_s = max(self._clock.free_s, self._clock.now_s)
                self._push([Move(**order["move"])], begin_s, 0.0)
            case "stop" | "sample":
                self._sent[order["job"]].is_over = True

    def result(self, job: int) -> str | None:
        """The digest of a hand-over, once all of it is there; None before."""
        sent = self._sent[job]
        return _DIGEST if sent.is_over and self._clock.now_s >= sent.end_s else None

    def launched(self) -> _Moment:
        """The end of all that was launched so far."""
        return _Moment(self._clock, self._clock.free_s)

    def leave(self, begin_s: float, step_s: float) -> None:
        """Send what leaves with a step that begins and takes so long."""
        moves, self._next = self._next, []
        if moves:
            self._free_s = max(self._free_s, begin_s + self._handshake_s)
            self._push(moves, begin_s, step_s)

    def _push(self, moves: Sequence[Move], begin_s: float, step_s: float) -> None:
        layers = self._link.layers
        for number, layer in enumerate(layers, start=1):
            ready_s = begin_s + step_s * number / len(layers)
            for move in moves:
                size_bytes = len(move.pages) * layer.page_bytes + move.is_last * layer.state_bytes
                self._free_s = max(self._free_s, ready_s) + size_bytes / self._link.bytes_per_s
                self._sent[move.job].end_s = self._free_s
        for move in moves:
            if move.is_last:
                self._sent[move.job].end_s += self._handshake_s
                self._sent[move.job].is_over = True


class PushingLauncher(VirtualLauncher):
    """Starts the steps of a pool whose layers leave while the next ones are computed.

    Args:
        plan: of the programs.
        times: of its steps.
        clock: of host and device.
        ranks: that push.

    Attributes:
        announce: is called before each step, and tells the ranks what leaves with it.
    """

    def __init__(
        self, plan: Plan, times: StepTimes, clock: VirtualClock, ranks: VirtualRanks
    ) -> None:
        super().__init__(plan, times, clock)
        self.announce: Callable[[Part], object] = lambda part: None
        self._ranks = ranks

    def start(self, batch: Batch, part: Part = "whole") -> float:
        """Let the clock know of a step, and the ranks of what leaves with it."""
        self.announce(part)
        waited_s = super().start(batch, part)
        step = self.steps[-1]
        self._ranks.leave(step.begin_s, step.end_s - step.begin_s)
        return waited_s
