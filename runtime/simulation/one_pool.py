"""A load on its way through the pool of a plan that answers, event by event."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq

from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.output import OutputProcessor
from tokenspeed_plan.runtime.request_check import check_length
from tokenspeed_plan.runtime.scheduling.scheduler import Scheduler
from tokenspeed_plan.runtime.scheduling.sequence import Sequence
from tokenspeed_plan.runtime.simulation.load import Arrival, Load
from tokenspeed_plan.runtime.simulation.load_results import Answered, Simulated
from tokenspeed_plan.runtime.simulation.sleepers import (
    NappingLoop,
    NappingScheduler,
    Sleepers,
    may_sleep,
)
from tokenspeed_plan.runtime.simulation.virtual_steps import (
    StepTimes,
    VirtualClock,
    VirtualLauncher,
    VirtualMover,
    plain_token,
    short_digests,
)
from tokenspeed_plan.runtime.step_loop import StepLoop

Progress = Callable[[int], None]
Look = Callable[[Scheduler], object]


class OnePool:
    """A load on its way; see `simulate`.

    Args:
        plan: what would be replayed.
        times: what its steps take.
        load: the requests.
        acceptance: see `VirtualLauncher`.
        seed: of the drafts that are accepted.
        every_step: go through each step for each sequence.
    """

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
        self._scheduler.cache.name_pages = short_digests
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
                arrived_s = self._arrived_s.pop(completion.request_id)
                self._answers.append(Answered.of(arrived_s, completion))
                self._load.answered(completion, self._clock.now_s)
                if progress is not None:
                    progress(len(self._answers))
            self._rest()
            if look is not None:
                look(self._scheduler)
        return Simulated(
            self._answers,
            self._launcher.steps,
            self._scheduler.metrics,
            self._clock.now_s,
            self._clock.busy_s,
        )

    @property
    def _is_idle(self) -> bool:
        """Whether nothing is left to do for those who have come."""
        return not self._scheduler.num_unfinished and self._loop.in_flight is None

    @property
    def _arrival_s(self) -> float:
        """When the next request comes, as far as is known; infinity where none will."""
        next_s = self._load.next_time_s()
        return math.inf if next_s is None else next_s

    def _has_work(self) -> bool:
        """Take what has come by now; where nothing is left to do, wait for the next request."""
        next_s = self._arrival_s
        if self._is_idle and next_s < math.inf:
            self._clock.wait_until(next_s)
        self._take_arrivals()
        return not self._is_idle

    def _rest(self) -> None:
        """Go through steps in which nothing but tokens comes."""
        if isinstance(self._loop, NappingLoop):
            self._loop.rest(self._arrival_s)

    def _take_arrivals(self) -> None:
        """Queue what has come by now."""
        while self._arrival_s <= self._clock.now_s:
            self._add(self._load.pop())

    def _add(self, arrival: Arrival) -> None:
        request = arrival.request
        check_length(request, self._plan.pool.limits.max_seq_len)
        self._arrived_s[request.request_id] = arrival.time_s
        known, token_ids = arrival.digests, list(request.prompt_ids)
        self._loop.add(Sequence(request, arrival.time_s, token_ids, digests=known))
