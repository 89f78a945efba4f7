"""Schedule: the order of the steps, the stream of each, and the events between streams.

With one stream the order is the graph's own. With more, it follows the critical path (list
scheduling): of the operators that are ready, the one with the longest path to the end goes first.
It continues the stream of a producer that no other operator has continued yet; else it opens the
next stream. Each dependency between two streams gets one event. `simulate` decides whether more
streams pay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from tokenspeed_plan.planner.graph import Op, OpGraph, ScheduledOp, ScheduledStep, Stage
from tokenspeed_plan.plans.schema import RecordEvent, WaitEvent


def schedule(
    graph: OpGraph, num_streams: int = 1, times_us: Mapping[str, float] | None = None
) -> OpGraph:
    """The graph with its steps.

    Args:
        graph: fused.
        num_streams: the most streams to use.
        times_us: predicted time of each operator by name; all count the same where it is missing.
    """
    order = graph.ordered()
    if num_streams > 1:
        order = _by_critical_path(graph, times_us or {})
    streams = _Streams(num_streams)
    for op in order:
        producers: list[str] = []  # with one stream nothing waits for them
        if num_streams > 1:
            producers += graph.nx.predecessors(op.name)
        streams.place(op, producers)
    streams.join()
    steps = tuple(streams.finish())
    return graph.to(Stage.SCHEDULED, steps=steps, num_streams=streams.used)


def _by_critical_path(graph: OpGraph, times_us: Mapping[str, float]) -> Iterator[Op]:
    """Operators in topological order: of those that are ready, the one furthest from the end."""
    order = list(graph.ordered())
    left_us = _path_us(graph, order, times_us)
    position = {op.name: index for index, op in enumerate(order)}
    waiting = {op.name: graph.nx.in_degree(op.name) for op in order}
    ready: list[tuple[float, int]] = []
    urgency = {name: (-us, position[name]) for name, us in left_us.items()}
    for name, count in waiting.items():
        if count == 0:
            heappush(ready, urgency[name])
    while ready:
        _, index = heappop(ready)
        op = order[index]
        yield op
        for name in graph.nx.successors(op.name):
            waiting[name] -= 1
            if waiting[name] == 0:
                heappush(ready, urgency[name])


def _path_us(
    graph: OpGraph, order: Sequence[Op], times_us: Mapping[str, float]
) -> dict[str, float]:
    """For each operator the longest path from its start to the end of the program."""
    left_us: dict[str, float] = {}
    for op in reversed(order):
        followers = graph.nx.successors(op.name)
        paths_us = [left_us[name] for name in followers]
        own_us = times_us.get(op.name, 1.0)
        left_us[op.name] = own_us + max(paths_us, default=0.0)
    return left_us


@dataclass
class _Streams:
    """The streams so far.

    Attributes:
        num_streams, used: the most streams, and how many there are.
        steps: in order, without the records of events.
        stream_of, position: of each operator.
        tail: last operator of each stream.
        seen: for (waiting stream, other stream) the position that was waited for last.
        waits: the producer of each event.
    """

    num_streams: int
    used: int = 1
    steps: list[ScheduledStep] = field(default_factory=list)
    stream_of: dict[str, int] = field(default_factory=dict)
    position: dict[str, int] = field(default_factory=dict)
    tail: dict[int, str] = field(default_factory=dict)
    seen: dict[tuple[int, int], int] = field(default_factory=dict)
    waits: list[str] = field(default_factory=list)

    def place(self, op: Op, producers: list[str]) -> None:
        """Put an operator on a stream, after waits for what it needs from others."""
        stream = self._choose(producers)
        self.used = max(self.used, stream + 1)
        for producer in producers:
            self._wait(stream, producer)
        name = op.name
        self.steps.append(ScheduledOp(name, stream))
        self.stream_of[name] = stream
        self.position[name] = len(self.position)
        self.tail[stream] = name

    def _choose(self, producers: list[str]) -> int:
        if not producers:
            return 0
        streams = {name: self.stream_of[name] for name in producers}
        free = [stream for name, stream in streams.items() if self.tail[stream] == name]
        if free:
            return min(free)
        last = max(producers, key=self.position.__getitem__)
        home = streams[last]
        for stream in range(self.num_streams):
            if self._is_idle(stream, home):
                return stream
        return home

    def _is_idle(self, stream: int, home: int) -> bool:
        """Whether a stream has no work, or none that `home` has not waited for."""
        if stream not in self.tail:
            return True
        tail = self.tail[stream]
        seen = self.seen.get((home, stream), -1)
        return seen >= self.position[tail]

    def _wait(self, stream: int, producer: str) -> None:
        source = self.stream_of[producer]
        if source == stream:
            return
        position = self.position[producer]
        key = (stream, source)
        if self.seen.get(key, -1) >= position:
            return
        self.seen[key] = position
        event = len(self.waits)
        self.steps.append(WaitEvent(event=event, stream=stream))
        self.waits.append(producer)

    def join(self) -> None:
        """Stream 0 waits for what is still running elsewhere."""
        for stream, last in sorted(self.tail.items()):
            if stream:
                self._wait(0, last)

    def finish(self) -> list[ScheduledStep]:
        """The steps with each event recorded right after its producer."""
        records: dict[str, list[RecordEvent]] = {}
        for event, producer in enumerate(self.waits):
            record = RecordEvent(event=event, stream=self.stream_of[producer])
            records.setdefault(producer, []).append(record)
        done: list[ScheduledStep] = []
        for step in self.steps:
            done.append(step)
            if isinstance(step, ScheduledOp):
                done += records.get(step.op_name, [])
        return done
