"""How long a schedule takes, and which takes least: streams replayed against a model of the machine.

A kernel first waits (its launch, or its peers), which costs the other streams nothing; then it
works, and kernels that work at the same time share the machine's memory and cores evenly. An event
between streams costs `EVENT_US`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tokenspeed_plan.planner.advisor.hardware import HardwareSpec
from tokenspeed_plan.planner.graph import OpGraph
from tokenspeed_plan.planner.passes.cost import Load, OpTime, op_time
from tokenspeed_plan.planner.passes.schedule import ops_by_step, schedule, step_key
from tokenspeed_plan.plans.schema import RecordEvent, Step, WaitEvent

# from a recorded event to the first kernel of a stream that waited for it, inside a graph
EVENT_US = 1.0

MAX_STREAMS = 3
MIN_GAIN = 0.01  # less is within the error of the model


@dataclass
class _Lane:
    """One stream: the steps that are left, and the kernel under way."""

    steps: list[Step]
    waits_us: float = 0.0
    works_us: float = 0.0

    @property
    def idle(self) -> bool:
        return not (self.waits_us or self.works_us)


@dataclass
class _Timeline:
    lanes: list[_Lane]
    times: Mapping[str, OpTime]
    now_us: float = 0.0
    recorded: set[int] = field(default_factory=set)

    def start(self) -> None:
        """Begin whatever can begin now; events take no time but what they cost who waits."""
        moved = True
        while moved:
            moved = sum(map(self._start, self.lanes)) > 0

    def _start(self, lane: _Lane) -> bool:
        if not lane.idle or not lane.steps:
            return False
        step = lane.steps[0]
        if isinstance(step, WaitEvent):
            if step.event not in self.recorded:
                return False
            lane.waits_us = EVENT_US
        elif isinstance(step, RecordEvent):
            self.recorded.add(step.event)
        else:
            time = self.times[step_key(step)]
            lane.waits_us, lane.works_us = time.latency_us, time.busy_us
        lane.steps.pop(0)
        return True

    def advance(self) -> None:
        """Go on to the next moment at which something ends."""
        working = [lane for lane in self.lanes if lane.works_us and not lane.waits_us]
        waiting = [lane for lane in self.lanes if lane.waits_us]
        share = max(len(working), 1)
        step_us = min(
            [lane.waits_us for lane in waiting] + [lane.works_us * share for lane in working]
        )
        self.now_us += step_us
        for lane in waiting:
            lane.waits_us = _less(lane.waits_us, step_us)
        for lane in working:
            lane.works_us = _less(lane.works_us, step_us / share)


def _less(left: float, by: float) -> float:
    return left - by if left - by > 1e-9 else 0.0


def simulate_us(steps: Sequence[Step], num_streams: int, times: Mapping[str, OpTime]) -> float:
    """Microseconds from the first launch to the last result."""
    lanes = [
        _Lane([step for step in steps if step.stream == stream]) for stream in range(num_streams)
    ]
    timeline = _Timeline(lanes, times)
    timeline.start()
    while not all(lane.idle for lane in lanes):
        timeline.advance()
        timeline.start()
    return timeline.now_us


def schedule_best(
    graph: OpGraph, load: Load, hardware: HardwareSpec, replayed: int = MAX_STREAMS
) -> OpGraph:
    """The graph with the steps that take least time; on one stream unless more gain at least `MIN_GAIN`.

    A CPU runs one kernel after the other. More than `replayed` streams are simulated, and not
    chosen.
    """
    times = {key: op_time(graph, op, load, hardware) for key, op in ops_by_step(graph).items()}
    lengths = {op.name: times[key].total_us for key, op in ops_by_step(graph).items()}
    most = MAX_STREAMS if hardware.sm else 1
    tried = [schedule(graph, count, lengths) for count in range(1, most + 1)]
    timed = [
        replace(made, time_us=simulate_us(made.steps, made.num_streams, times)) for made in tried
    ]
    best = min(timed[:replayed], key=lambda made: made.time_us)
    best = best if best.time_us < (1.0 - MIN_GAIN) * timed[0].time_us else timed[0]
    rest = [made.time_us for made in timed if made.num_streams != best.num_streams]
    return replace(best, runner_up_us=min(rest, default=None))
