"""Schedule: the order of the steps, the stream of each, and the events between streams.

With one stream the order is the graph's own. With more, it is that of the critical path (list
scheduling): of what is ready, the operator with the longest way to the end goes first. It goes on
with the stream of a producer that nobody has continued yet, else it opens the next stream; each
crossing gets one event. Whether more streams pay is decided by simulation (`timeline`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from tokenspeed_plan.planner.graph import Op, OpGraph, Stage
from tokenspeed_plan.plans.schema import CollectiveCall, KernelCall, RecordEvent, Step, WaitEvent


def schedule(
    graph: OpGraph, num_streams: int = 1, times_us: Mapping[str, float] | None = None
) -> OpGraph:
    """The graph with its steps. Kernels are named by their operators until they are lowered.

    Args:
        graph: fused.
        num_streams: at most so many.
        times_us: of each operator; all equal where they are not given.
    """
    plan = _Streams(num_streams)
    for op in graph.ordered() if num_streams == 1 else _by_critical_path(graph, times_us or {}):
        producers = list(graph.nx.predecessors(op.name))
        plan.place(op, producers)
    plan.join()
    return graph.to(Stage.SCHEDULED, steps=tuple(plan.finish()), num_streams=plan.used)


def _by_critical_path(graph: OpGraph, times_us: Mapping[str, float]) -> Iterator[Op]:
    """Operators in topological order; of those that are ready the one with the longest way to the end."""
    order = list(graph.ordered())
    left: dict[str, float] = {}
    for op in reversed(order):
        after = max((left[name] for name in graph.nx.successors(op.name)), default=0.0)
        left[op.name] = after + times_us.get(op.name, 1.0)
    place = {op.name: index for index, op in enumerate(order)}
    waiting = {op.name: graph.nx.in_degree(op.name) for op in order}
    ready = [(-left[name], place[name]) for name, count in waiting.items() if count == 0]
    heapify(ready)
    while ready:
        op = order[heappop(ready)[1]]
        yield op
        for name in graph.nx.successors(op.name):
            waiting[name] -= 1
            if waiting[name] == 0:
                heappush(ready, (-left[name], place[name]))


@dataclass
class _Streams:
    num_streams: int
    used: int = 1
    steps: list[Step] = field(default_factory=list)
    stream_of: dict[str, int] = field(default_factory=dict)
    tail: dict[int, str] = field(default_factory=dict)  # last operator of each stream
    seen: dict[tuple[int, int], int] = field(
        default_factory=dict
    )  # (waiter, source) -> position already waited for
    position: dict[str, int] = field(default_factory=dict)
    waits: list[tuple[int, int, str]] = field(
        default_factory=list
    )  # (index in steps, stream, producer)

    def place(self, op: Op, producers: list[str]) -> None:
        """Put an operator on a stream, after waits for what it needs from others."""
        stream = self._choose(producers)
        self.used = max(self.used, stream + 1)
        for producer in producers:
            self._wait(stream, producer)
        self.steps.append(_step(op, stream))
        self.stream_of[op.name] = stream
        self.position[op.name] = len(self.position)
        self.tail[stream] = op.name

    def _choose(self, producers: list[str]) -> int:
        free = [
            self.stream_of[name] for name in producers if self.tail[self.stream_of[name]] == name
        ]
        if free or not producers:
            return min(free, default=0)
        home = self.stream_of[max(producers, key=self.position.__getitem__)]
        return next(
            (stream for stream in range(self.num_streams) if self._is_idle(stream, home)), home
        )

    def _is_idle(self, stream: int, home: int) -> bool:
        """Whether a stream has no work, or none that `home` has not waited for."""
        return (
            stream not in self.tail
            or self.seen.get((home, stream), -1) >= self.position[self.tail[stream]]
        )

    def _wait(self, stream: int, producer: str) -> None:
        source = self.stream_of[producer]
        key = (stream, source)
        if source == stream or self.seen.get(key, -1) >= self.position[producer]:
            return
        self.seen[key] = self.position[producer]
        self.waits.append((len(self.steps), stream, producer))
        self.steps.append(WaitEvent(event=len(self.waits) - 1, stream=stream))

    def join(self) -> None:
        """Stream 0 waits for what is still running elsewhere."""
        for stream, last in sorted(self.tail.items()):
            if stream:
                self._wait(0, last)

    def finish(self) -> list[Step]:
        """The steps with each event recorded right after its producer."""
        records: dict[str, list[Step]] = {}
        for event, (_, _, producer) in enumerate(self.waits):
            records.setdefault(producer, []).append(
                RecordEvent(event=event, stream=self.stream_of[producer])
            )
        done: list[Step] = []
        for step in self.steps:
            done.append(step)
            done += records.get(step_key(step), [])
        return done


def _step(op: Op, stream: int) -> Step:
    if op.kind in ("all_reduce", "all_gather"):
        return CollectiveCall(
            op=op.kind, source=op.inputs[0], target=op.outputs[0], stream=stream, predicted_us=0.0
        )  # type: ignore[arg-type]
    return KernelCall(kernel=op.name, args=(), stream=stream, predicted_us=0.0)


def step_key(step: Step) -> str:
    """The operator that a step stands for: collectives are found by what they write."""
    if isinstance(step, KernelCall):
        return step.kernel
    return f"{step.target}.{step.op}" if isinstance(step, CollectiveCall) else ""


def ops_by_step(graph: OpGraph) -> Mapping[str, Op]:
    """Operators by the key of their step."""
    return {step_key(_step(op, 0)): op for op in graph.ops}
