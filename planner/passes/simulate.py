"""How long a schedule takes, and which is shortest: streams simulated on a model of the machine.

A kernel first waits (for its launch, or for its peers), which costs the other streams nothing. Then
it works, and kernels that work at the same time share the machine's memory and cores evenly. An
event between streams costs `EVENT_US`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tokenspeed_plan.planner.graph import OpGraph, ScheduledStep
from tokenspeed_plan.planner.ledger import Ledger
from tokenspeed_plan.planner.machines.hardware import HardwareSpec
from tokenspeed_plan.planner.passes.cost import Load, OpTime, op_time
from tokenspeed_plan.planner.passes.schedule import schedule
from tokenspeed_plan.plans.schema import RecordEvent, WaitEvent

# Inside a CUDA graph, from a recorded event to the first kernel of a stream that waited for it.
EVENT_US = 1.0

MAX_STREAMS = 3
MIN_GAIN = 0.01  # less is within the error of the model


@dataclass
class _Stream:
    """The steps that are left of one stream, and the kernel under way."""

    steps: list[ScheduledStep]
    waits_us: float = 0.0
    works_us: float = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether no kernel is under way."""
        return not (self.waits_us or self.works_us)

    @property
    def is_working(self) -> bool:
        """Whether its kernel has begun to work."""
        return self.works_us > 0.0 and not self.waits_us


@dataclass
class _Timeline:
    """The simulated time, and what each stream does at it."""

    streams: list[_Stream]
    times: Mapping[str, OpTime]
    now_us: float = 0.0
    recorded: set[int] = field(default_factory=set)

    def start(self) -> None:
        """Begin whatever can begin now; an event costs time only where a stream waits for it."""
        moved = True
        while moved:
            started = [self._start(stream) for stream in self.streams]
            moved = any(started)

    def _start(self, stream: _Stream) -> bool:
        if not stream.is_idle or not stream.steps:
            return False
        step = stream.steps[0]
        if isinstance(step, WaitEvent):
            if step.event not in self.recorded:
                return False
            stream.waits_us = EVENT_US
        elif isinstance(step, RecordEvent):
            self.recorded.add(step.event)
        else:
            time = self.times[step.op_name]
            stream.waits_us = time.latency_us
            stream.works_us = time.busy_us
        stream.steps.pop(0)
        return True

    def advance(self) -> None:
        """Go on to the next moment at which something ends."""
        waiting = [stream for stream in self.streams if stream.waits_us]
        working = [stream for stream in self.streams if stream.is_working]
        share = max(len(working), 1)
        ends_us = [stream.waits_us for stream in waiting]
        ends_us += [stream.works_us * share for stream in working]
        step_us = min(ends_us)
        self.now_us += step_us
        for stream in waiting:
            stream.waits_us = _less(stream.waits_us, step_us)
        for stream in working:
            stream.works_us = _less(stream.works_us, step_us / share)


def _less(left: float, by: float) -> float:
    rest = left - by
    if rest > 1e-9:
        return rest
    return 0.0


def simulate_us(
    steps: Sequence[ScheduledStep], num_streams: int, times: Mapping[str, OpTime]
) -> float:
    """Microseconds from the first launch to the last result."""
    streams = []
    for number in range(num_streams):
        own = [step for step in steps if step.stream == number]
        streams.append(_Stream(own))
    timeline = _Timeline(streams, times)
    timeline.start()
    while not all(stream.is_idle for stream in streams):
        timeline.advance()
        timeline.start()
    return timeline.now_us


def schedule_best(
    graph: OpGraph, load: Load, hardware: HardwareSpec, max_streams: int = MAX_STREAMS
) -> OpGraph:
    """The graph with the shortest steps; on one stream unless more gain at least `MIN_GAIN`.

    A CPU runs one kernel after the other. More than `max_streams` streams are simulated for the
    record, and not chosen.
    """
    times = {op.name: op_time(graph, op, load, hardware) for op in graph.ops}
    lengths = {name: time.total_us for name, time in times.items()}
    most = 1
    if hardware.sm:
        most = MAX_STREAMS
    tried = []
    for num_streams in range(1, most + 1):
        scheduled = schedule(graph, num_streams, lengths)
        time_us = simulate_us(scheduled.steps, scheduled.num_streams, times)
        tried.append(replace(scheduled, time_us=time_us))
    single = tried[0]
    best = min(tried[:max_streams], key=_time_us)
    if best.time_us >= (1.0 - MIN_GAIN) * single.time_us:
        best = single
    others = [each.time_us for each in tried if each.num_streams != best.num_streams]
    runner_up_us = min(others, default=None)
    return replace(best, runner_up_us=runner_up_us)


def _time_us(graph: OpGraph) -> float:
    return graph.time_us


def record_streams(ledger: Ledger, graphs: Sequence[OpGraph]) -> None:
    """Write down how many streams the programs got, and what that is worth."""
    most = max(graph.num_streams for graph in graphs)
    compared = []
    for graph in graphs:
        if graph.runner_up_us is not None:
            compared.append((graph, graph.runner_up_us))
    reason = _reason(graphs, compared, most)
    if compared:
        graph, us = compared[-1]
        reason += f": {graph.phase} {graph.time_us:.1f} us, with other streams {us:.1f}"
    ledger.record("streams", str(most), reason)


def _reason(graphs: Sequence[OpGraph], compared: Sequence[tuple[OpGraph, float]], most: int) -> str:
    shorter = sum(us < (1 - MIN_GAIN) * graph.time_us for graph, us in compared)
    if shorter:
        return (
            f"{shorter} of {len(graphs)} programs would be shorter with more; "
            f"the runtime replays {most}"
        )
    if most > 1:
        gaining = sum(graph.num_streams > 1 for graph in graphs)
        return f"{gaining} of {len(graphs)} programs get shorter"
    if compared:
        return f"no branch shortens a program by {MIN_GAIN:.0%}"
    return "kernels run one after the other"
