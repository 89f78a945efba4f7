"""Place: every activation gets an offset in the arena; bytes are used again as soon as nobody can still touch them.

A buffer may take the bytes of another when all that was done with the other is ordered before its
own write: by the stream's order or by an event. First fit at the lowest offset, in the order of the
steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenspeed_plan.planner.graph import OpGraph, Stage
from tokenspeed_plan.planner.passes.schedule import ops_by_step, step_key
from tokenspeed_plan.plans.schema import RecordEvent, WaitEvent
from tokenspeed_plan.plans.types import aligned

Epoch = tuple[int, int]


@dataclass(slots=True)
class _Held:
    """Bytes given to a buffer, and everyone who touches them."""

    start: int
    end: int
    uses: list[Epoch] = field(default_factory=list)


def place(graph: OpGraph, max_tokens: int, max_seqs: int) -> OpGraph:
    """The graph with offsets for a program of this many tokens and sequences."""
    clocks = _clocks(graph)
    uses = _uses(graph, clocks)
    offsets: dict[str, int] = {}
    held: list[_Held] = []
    top = 0
    for op in graph.ordered():
        stream, clock = clocks[op.name]
        for name in op.outputs:
            tensor = graph.tensors[name]
            if tensor.arena != "activations":
                continue
            size = aligned(tensor.spec.size_bytes(max_tokens, max_seqs))
            busy = sorted(
                (h.start, h.end)
                for h in held
                if not all(_over(use, clock, stream) for use in h.uses)
            )
            offsets[name] = _first_fit(busy, size)
            held.append(_Held(offsets[name], offsets[name] + size, uses[name]))
            top = max(top, offsets[name] + size)
        if graph.num_streams == 1:
            held = [h for h in held if not all(_over(use, clock, stream) for use in h.uses)]
    return graph.to(Stage.PLACED, offsets=offsets, arena_bytes=top)


def _over(use: Epoch, clock: list[int], stream: int) -> bool:
    """Whether a use is ordered before the operator at this clock, that operator itself not counted."""
    user, time = use
    return clock[user] >= time and not (user == stream and clock[stream] == time)


def _first_fit(busy: list[tuple[int, int]], size: int) -> int:
    offset = 0
    for start, end in busy:
        if start - offset >= size:
            break
        offset = max(offset, end)
    return offset


def _clocks(graph: OpGraph) -> Mapping[str, tuple[int, list[int]]]:
    """The stream and vector clock of each operator."""
    now = [[0] * graph.num_streams for _ in range(graph.num_streams)]
    events: dict[int, list[int]] = {}
    by_step = ops_by_step(graph)
    clocks: dict[str, tuple[int, list[int]]] = {}
    for step in graph.steps:
        clock = now[step.stream]
        if isinstance(step, WaitEvent):
            clock[:] = map(max, clock, events[step.event])
        elif isinstance(step, RecordEvent):
            events[step.event] = list(clock)
        else:
            clock[step.stream] += 1
            clocks[by_step[step_key(step)].name] = (step.stream, list(clock))
    return clocks


def _uses(graph: OpGraph, clocks: Mapping[str, tuple[int, list[int]]]) -> dict[str, list[Epoch]]:
    uses: dict[str, list[Epoch]] = {}
    for op in graph.ops:
        stream, clock = clocks[op.name]
        for name in (*op.inputs, *op.outputs):
            uses.setdefault(name, []).append((stream, clock[stream]))
    return uses
