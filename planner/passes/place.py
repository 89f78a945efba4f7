"""Place: every activation gets an offset in its arena, and bytes are reused as soon as possible.

A buffer may take the bytes of another when every use of the other is ordered before its own write,
by the order of the stream or by an event. Buffers are placed in the order of the steps, each at the
lowest offset where it fits (first fit).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenspeed_plan.planner.graph import OpGraph, Stage
from tokenspeed_plan.plans.schema import RecordEvent, WaitEvent
from tokenspeed_plan.plans.types import aligned

Epoch = tuple[int, int]


@dataclass(slots=True)
class _Held:
    """Bytes given to a buffer, and the uses of that buffer."""

    start: int
    end: int
    uses: list[Epoch] = field(default_factory=list)

    def is_over(self, clock: list[int], stream: int) -> bool:
        """Whether every use is ordered before the operator at this clock, and is not its own."""
        for user, time in self.uses:
            if time > clock[user] or (user == stream and time == clock[stream]):
                return False
        return True


def place(graph: OpGraph, max_tokens: int, max_seqs: int) -> OpGraph:
    """The graph with offsets for a program of this many tokens and sequences."""
    clocks = _clocks(graph)
    uses = _uses(graph, clocks)
    arena = _Arena()
    offsets: dict[str, int] = {}
    for op in graph.ordered():
        busy = arena.busy(*clocks[op.name])
        if graph.num_streams == 1:  # what is over stays so
            arena.held = busy
        for name in op.outputs:
            tensor = graph.tensors[name]
            if tensor.arena != "activations":
                continue
            size = tensor.spec.size_bytes(max_tokens, max_seqs)
            held = arena.take(aligned(size), uses[name], busy)
            offsets[name] = held.start
            if arena.held is not busy:  # of several streams
                busy.append(held)
    return graph.to(Stage.PLACED, offsets=offsets, activation_bytes=arena.top)


@dataclass(slots=True)
class _Arena:
    """One arena while it is filled: what is held, and the most bytes so far."""

    held: list[_Held] = field(default_factory=list)
    top: int = 0

    def busy(self, stream: int, clock: list[int]) -> list[_Held]:
        """The buffers that an operator at this clock may not write, in a new list."""
        return [held for held in self.held if not held.is_over(clock, stream)]

    def take(self, size: int, uses: list[Epoch], busy: list[_Held]) -> _Held:
        """A buffer beside those that are busy."""
        spans = [(held.start, held.end) for held in busy]
        offset = _first_fit(sorted(spans), size)
        end = offset + size
        buffer = _Held(offset, end, uses)
        self.held.append(buffer)
        self.top = max(self.top, end)
        return buffer


def _first_fit(busy: list[tuple[int, int]], size: int) -> int:
    offset = 0
    for start, end in busy:
        if start - offset >= size:
            break
        offset = max(offset, end)
    return offset


def _clocks(graph: OpGraph) -> Mapping[str, tuple[int, list[int]]]:
    """The stream and vector clock of each operator."""
    streams = range(graph.num_streams)
    now = [[0 for _ in streams] for _ in streams]
    events: dict[int, list[int]] = {}
    clocks: dict[str, tuple[int, list[int]]] = {}
    for step in graph.steps:
        stream = step.stream
        clock = now[stream]
        if isinstance(step, WaitEvent):
            clock[:] = map(max, clock, events[step.event])
        elif isinstance(step, RecordEvent):
            events[step.event] = list(clock)
        else:
            clock[stream] += 1
            clocks[step.op_name] = (stream, list(clock))
    return clocks


def _uses(graph: OpGraph, clocks: Mapping[str, tuple[int, list[int]]]) -> dict[str, list[Epoch]]:
    """The last use of each tensor on each stream; those before it are over by then."""
    last: dict[str, dict[int, int]] = {}
    for op in graph.ops:
        stream, clock = clocks[op.name]
        time = clock[stream]
        for name in (*op.inputs, *op.outputs):
            times = last.setdefault(name, {})
            times[stream] = max(time, times.get(stream, 0))
    return {name: list(times.items()) for name, times in last.items()}
