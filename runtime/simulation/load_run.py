"""Runs a load through a plan's scheduler, cache and commits, event by event."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from tokenspeed_plan.plans.collector import no_garbage_collection
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.metrics import Metrics
from tokenspeed_plan.runtime.output import OutputProcessor
from tokenspeed_plan.runtime.request import Completion
from tokenspeed_plan.runtime.request_check import check_length
from tokenspeed_plan.runtime.scheduling.scheduler import Scheduler
from tokenspeed_plan.runtime.scheduling.sequence import Sequence
from tokenspeed_plan.runtime.simulation.load import Arrival, Load
from tokenspeed_plan.runtime.simulation.sleepers import (
    NappingLoop,
    NappingScheduler,
    Sleepers,
    may_sleep,
)
from tokenspeed_plan.runtime.simulation.virtual_steps import (
    StepRecord,
    StepTimes,
    VirtualClock,
    VirtualLauncher,
    VirtualMover,
    plain_token,
)
from tokenspeed_plan.runtime.step_loop import StepLoop

Progress = Callable[[int], None]
Look = Callable[[Scheduler], object]


@dataclass(frozen=True, slots=True)
class Answered:
    """An answered request.

    Attributes:
        arrival_s: when it came.
        queue_s: from then until it started.
        ttft_s: from then to its first token.
        decode_s: from its first token to its last.
        prompt_tokens, cached_tokens, output_tokens: of it.
    """

    arrival_s: float
    queue_s: float
    ttft_s: float
    decode_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int

    @property
    def tpot_s(self) -> float:
        """Seconds for each token after the first; 0 where there is none."""
        return self.decode_s / max(self.output_tokens - 1, 1)

    @classmethod
    def of(cls, arrival_s: float, completion: Completion) -> Answered:
        """From what the engine says of it."""
        return cls(
            arrival_s,
            completion.queue_s,
            completion.ttft_s,
            completion.decode_s,
            completion.num_prompt_tokens,
            completion.num_cached_tokens,
            len(completion.token_ids),
        )


@dataclass(frozen=True, slots=True)
class Simulated:
    """What a load was like.

    Attributes:
        answers: in the order of their ends.
        steps: all of them.
        metrics: the engine's own counters.
        total_s: from the beginning to the last answer.
        busy_s: in which the device computed.
    """

    answers: list[Answered]
    steps: list[StepRecord]
    metrics: Metrics
    total_s: float
    busy_s: float


def simulate(
    plan: Plan,
    times: StepTimes,
    load: Load,
    acceptance: Seq[float] = (),
    seed: int = 0,
    every_step: bool = False,
    progress: Progress | None = None,
    look: Look | None = None,
) -> Simulated:
    """Run a load to its end.

    Args:
        plan: what would be replayed.
        times: what its steps take.
        load: the requests.
        acceptance: see `VirtualLauncher`.
        seed: of the drafts that are accepted.
        every_step: go through each step for each sequence, which takes longer and finds the same.
        progress: is told how many requests are answered.
        look: is shown the scheduler now and then, with the clock's time.

    Raises:
        RequestError: the plan cannot hold a request.
    """
    with no_garbage_collection():
        simulation = _Simulation(plan, times, load, acceptance, seed, every_step)
        return simulation.run(progress, look)


class _Simulation:
    """A load on its way."""

    def __init__(
        self,
        plan: Plan,
        times: StepTimes,
        load: Load,
        acceptance: Seq[float],
        seed: int,
        every_step: bool,
    ) -> None:
        self._plan = plan
        self._load = load
        self._clock = VirtualClock()
        self._launcher = VirtualLauncher(plan, times, self._clock, acceptance, seed)
        self._scheduler, self._loop = self._engine(may_sleep(plan) and not every_step)
        self._answers: list[Answered] = []
        self._arrived_s: dict[str, float] = {}

    def _engine(self, naps: bool) -> tuple[Scheduler, StepLoop]:
        """The engine's scheduler and loop; those whose sequences may sleep are as exact."""
        plan, outputs = self._plan, OutputProcessor(None)
        if not naps:
            mover = VirtualMover(plan, self._clock)
            plain = Scheduler(plan, clock=self._clock, mover=mover)
            return plain, StepLoop(plan, self._launcher, plain, outputs)
        sleepers = Sleepers(plain_token(plan))
        scheduler = NappingScheduler(plan, sleepers, self._clock)
        return scheduler, NappingLoop(plan, self._launcher, scheduler, outputs, sleepers)

    def run(self, progress: Progress | None, look: Look | None) -> Simulated:
        """Until nobody asks any more."""
        while self._has_work():
            for completion in self._loop.step(None):
                self._note(completion)
                if progress is not None:
                    progress(len(self._answers))
            if isinstance(self._loop, NappingLoop):
                next_s = self._load.next_time_s()
                self._loop.rest(math.inf if next_s is None else next_s)
            if look is not None:
                look(self._scheduler)
        return Simulated(
            self._answers,
            self._launcher.steps,
            self._scheduler.metrics,
            self._clock.now_s,
            self._clock.busy_s,
        )

    def _has_work(self) -> bool:
        """Take what has come by now; where nothing is left to do, wait for the next request."""
        is_idle = not self._scheduler.num_unfinished and self._loop.in_flight is None
        next_s = self._load.next_time_s()
        if is_idle and next_s is not None:
            self._clock.wait_until(next_s)
        while next_s is not None and next_s <= self._clock.now_s:
            self._add(self._load.pop())
            is_idle = False
            next_s = self._load.next_time_s()
        return not is_idle

    def _add(self, arrival: Arrival) -> None:
        request = arrival.request
        check_length(request, self._plan.pool.limits.max_seq_len)
        self._arrived_s[request.request_id] = arrival.time_s
        self._loop.add(Sequence(request, arrival.time_s, list(request.prompt_ids)))

    def _note(self, completion: Completion) -> None:
        arrived_s = self._arrived_s.pop(completion.request_id)
        self._answers.append(Answered.of(arrived_s, completion))
        self._load.answered(completion, self._clock.now_s)
