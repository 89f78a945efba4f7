"""Races in a program: each byte must be written before it is read, in an order that is certain.

Steps on one stream run in order; streams are ordered only by events. As in a race detector (vector
clocks: Mattern, 1988; FastTrack: Flanagan and Freund, PLDI 2009), each access carries the time of
its stream, and two accesses to the same bytes, one of them a write, must be ordered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tokenspeed_plan.plans.ops import BATCH_STATE, Access, ShapeError, require
from tokenspeed_plan.plans.schema import (
    BufferSpec,
    Call,
    CollectiveCall,
    KernelCall,
    KernelSpec,
    Program,
    RecordEvent,
    Step,
    WaitEvent,
)

Clock = list[int]  # for each stream, how many of its steps are known to be over
Epoch = tuple[int, int]  # a step: its stream, and its number there
Kernels = Mapping[str, KernelSpec]
Buffers = Mapping[str, BufferSpec]
Touch = tuple[str, Access]


def check_hazards(program: Program, kernels: Kernels, buffers: Buffers) -> None:
    """Refuse a program whose result depends on anything but its steps.

    Raises:
        ShapeError: a read of what was not written or was overwritten, a race, or an event without
            its partner.
    """
    _check_prefetches(program, kernels)
    detector = _RaceDetector(program, buffers)
    for step in program.steps:
        detector.visit(step, _touched(step, kernels), _write_slots(step, kernels))
    detector.finish()


def _check_prefetches(program: Program, kernels: Kernels) -> None:
    """What a kernel prefetches must be older than the step before it on its stream."""
    before: dict[int, Step] = {}
    for step in program.steps:
        if isinstance(step, (RecordEvent, WaitEvent)):
            continue
        if isinstance(step, KernelCall):
            _check_prefetch(step, before.get(step.stream), kernels)
        before[step.stream] = step


def _check_prefetch(step: KernelCall, last: Step | None, kernels: Kernels) -> None:
    launch = kernels[step.kernel].launch
    if launch is None or not launch.prefetch:
        return
    waits = False
    if isinstance(last, KernelCall):
        last_launch = kernels[last.kernel].launch
        waits = last_launch is not None and last_launch.trigger_after_wait
    require(waits, f"`{step.kernel}` prefetches behind a kernel that does not wait")
    assert last is not None
    touched = _touched(last, kernels)
    written = {name for name, access in touched if access != "read"}
    places = step.places(kernels[step.kernel])
    for param in launch.prefetch:
        name = places.get(param, "")
        require(
            name not in written,
            f"`{step.kernel}` prefetches `{name}` behind the step that makes it",
        )


def _touched(step: Step, kernels: Kernels) -> list[Touch]:
    """The buffers that a step touches; weights are left out, they never change."""
    if isinstance(step, Call):
        return _touched_by_kernel(step, kernels[step.kernel])
    if isinstance(step, CollectiveCall):
        return [(step.source, "read"), (step.target, "write")]
    return []


def _touched_by_kernel(step: Call, kernel: KernelSpec) -> list[Touch]:
    fixed: dict[str, Access] = {"input": "read", "output": "write"}
    touched: list[Touch] = []
    for param, name in zip(kernel.tensors, step.args, strict=True):
        if param.role == "weight":
            continue
        access = fixed.get(param.role, param.access)
        touched.append((name, access))
    return touched


def _write_slots(step: Step, kernels: Kernels) -> dict[str, str]:
    """For each KV cache that a step writes, the buffer with the slots that it writes to."""
    if not isinstance(step, Call):
        return {}
    kernel = kernels[step.kernel]
    args = step.places(kernel)
    slots = {}
    for part in kernel.parts:
        if part.kind == "kv_write":
            _, _, slot_mapping, kv_cache = part.operands
            slots[args[kv_cache]] = args[slot_mapping]
    return slots


@dataclass(slots=True)
class _Span:
    """Bytes of an arena that a buffer holds, and the steps that touched them since."""

    start: int
    end: int
    writer: Epoch
    readers: list[Epoch] = field(default_factory=list)

    def meets(self, other: _Span) -> bool:
        """Whether they have a byte in common."""
        start = max(self.start, other.start)
        end = min(self.end, other.end)
        return start < end

    def without(self, other: _Span) -> list[_Span]:
        """What is left on both sides of another span."""
        rest = []
        if self.start < other.start:
            rest.append(replace(self, end=other.start))
        if other.end < self.end:
            rest.append(replace(self, start=other.end))
        return rest


class _RaceDetector:
    """Visits the steps of a program in order, and keeps who touched what, and what is ordered.

    Attributes:
        clocks: for each stream, the steps of all streams that are over before its next step.
        spans: for each arena, the bytes that were written, by the buffer that holds them last.
        intact: buffers whose bytes are all still their own.
        state: for each state or scratch buffer its last writer; `readers` are those since.
        filled: KV caches, each with a slot buffer that it was written at.
    """

    def __init__(self, program: Program, buffers: Buffers) -> None:
        self.program = program
        self.buffers = buffers
        self.clocks = _clocks_at_zero(program.num_streams)
        self.started = {0}
        self.events: dict[int, Clock] = {}
        self.waited: set[int] = set()
        self.spans: dict[str, list[_Span]] = {}
        self.intact: dict[str, _Span] = {}
        self.written: set[str] = set()
        self.unread: set[str] = set()
        self.state: dict[str, Epoch] = {}
        self.readers: dict[str, list[Epoch]] = {}
        self.filled: set[tuple[str, str]] = set()
        self.slots: dict[str, str] = {}
        self.input_readers: dict[str, list[Epoch]] = {}
        self.advanced: set[str] = set()
        for name in program.inputs:
            is_io = name in buffers and buffers[name].arena == "io"
            require(is_io, f"input `{name}` is not an io buffer")

    def visit(self, step: Step, touched: list[Touch], slots: dict[str, str]) -> None:
        """One step: it reads first, then it writes.

        Raises:
            ShapeError: it is not ordered after what it depends on.
        """
        clock = self.clocks[step.stream]
        if isinstance(step, WaitEvent):
            self._wait(step, clock)
            return
        started = step.stream in self.started
        require(started, f"stream {step.stream} works before it waits for another")
        clock[step.stream] += 1
        if isinstance(step, RecordEvent):
            require(step.event not in self.events, f"event {step.event} is recorded twice")
            self.events[step.event] = list(clock)
        self.slots = slots
        epoch = (step.stream, clock[step.stream])
        for name, access in sorted(touched, key=_writes):
            self._touch(name, access, epoch, clock)

    def _wait(self, step: WaitEvent, clock: Clock) -> None:
        event = step.event
        recorded = self.events.get(event)
        if recorded is None:
            raise ShapeError(f"event {event} is waited for and not recorded before")
        clock[:] = map(max, clock, recorded)
        self.waited.add(event)
        self.started.add(step.stream)

    def _touch(self, name: str, access: Access, epoch: Epoch, clock: Clock) -> None:
        arena = self.buffers[name].arena
        if arena in ("scratch", "symmetric"):
            last = self.state.get(name, (0, 0))
            require(_is_before(last, clock), f"`{name}` is used by two streams at once")
            self.state[name] = epoch
        elif arena in ("kv_cache", "state"):
            self._touch_state(name, access, epoch, clock)
        elif access == "update":
            self._advance(name, clock)
        elif access == "read":
            self._read(name, epoch, clock)
        else:
            self._write(name, epoch, clock)

    def _touch_state(self, name: str, access: Access, epoch: Epoch, clock: Clock) -> None:
        """A state is written once. A KV cache may be written again elsewhere, after all reads."""
        if access == "read":
            known = name in self.state and _is_before(self.state[name], clock)
            require(known, f"`{name}` is read before it is written")
            self.readers.setdefault(name, []).append(epoch)
            return
        slots = self.slots.get(name)
        earlier = self.readers.pop(name, [])
        if name in self.state:
            require(slots is not None, f"`{name}` is written twice")
            earlier.append(self.state[name])
        place = (name, slots or "")
        require(place not in self.filled, f"`{name}` is written twice at `{slots}`")
        for other in earlier:
            over = _is_before(other, clock)
            require(over, f"`{name}` is written while it may still be in use")
        self.filled.add(place)
        self.state[name] = epoch

    def _read(self, name: str, epoch: Epoch, clock: Clock) -> None:
        if name in self.program.inputs:
            current = name not in self.advanced
            require(current, f"`{name}` is read after it advanced to the next step")
            self.input_readers.setdefault(name, []).append(epoch)
            return
        self.unread.discard(name)
        require(name in self.written, f"`{name}` is read before it is written")
        require(name in self.intact, f"`{name}` is overwritten before it is read")
        span = self.intact[name]
        over = _is_before(span.writer, clock)
        require(over, f"`{name}` is read while another stream may still write it")
        span.readers.append(epoch)

    def _advance(self, name: str, clock: Clock) -> None:
        """An input takes its value for the next run; all that read this one's must be over."""
        is_input = name in self.program.inputs
        require(
            is_input and name not in self.advanced,
            f"`{name}` is not an input to advance",
        )
        readers = self.input_readers.get(name, [])
        for reader in readers:
            over = _is_before(reader, clock)
            require(over, f"`{name}` advances while it may still be read")
        self.advanced.add(name)

    def _write(self, name: str, epoch: Epoch, clock: Clock) -> None:
        program = self.program
        known = name in self.written or name in program.inputs
        require(not known, f"`{name}` is written twice")
        self.written.add(name)
        self.unread.add(name)
        buffer = self.buffers[name]
        if buffer.arena == "io":  # each has bytes of its own
            self.intact[name] = _Span(0, 0, epoch)
            return
        start = buffer.offset_bytes
        size = buffer.tensor.size_bytes(program.max_tokens, program.max_seqs)
        span = _Span(start, start + size, epoch)
        self._claim(name, span, clock)
        self.intact[name] = span

    def _claim(self, name: str, new: _Span, clock: Clock) -> None:
        """Take bytes from the buffers that hold them; the steps that touched them must be over."""
        arena = self.buffers[name].arena
        kept: list[_Span] = []
        for span in self.spans.get(arena, []):
            if not span.meets(new):
                kept.append(span)
                continue
            for epoch in (span.writer, *span.readers):
                over = _is_before(epoch, clock) and epoch != new.writer
                require(over, f"`{name}` is written while its bytes may still be in use")
            self._drop(span)
            kept += span.without(new)
        self.spans[arena] = [*kept, new]

    def _drop(self, span: _Span) -> None:
        """The buffer that held all these bytes is no longer intact."""
        owners = [name for name, held in self.intact.items() if held is span]
        for name in owners:
            del self.intact[name]

    def finish(self) -> None:
        """At the end all streams have joined stream 0, and the outputs are in place.

        Raises:
            ShapeError: an event has no partner, or something is missing or was made for nothing.
        """
        program = self.program
        end = self.clocks[0]
        for stream, clock in enumerate(self.clocks):
            joined = clock[stream] <= end[stream]
            require(joined, f"stream {stream} is not waited for at the end")
        forgotten = self.events.keys() - self.waited
        for event in sorted(forgotten):
            raise ShapeError(f"event {event} is recorded and never waited for")
        if program.phase == "decode":
            self._check_advanced()
        for name in program.outputs:
            intact = name in self.intact
            require(intact, f"output `{name}` is not there at the end")
        useless = self.unread.difference(program.outputs)
        for name in sorted(useless):
            raise ShapeError(f"`{name}` is written and never read")

    def _check_advanced(self) -> None:
        """A decode step leaves the inputs of the next one."""
        advancing = {*BATCH_STATE, "state_lens"}
        missing = advancing.intersection(self.program.inputs) - self.advanced
        for name in sorted(missing):
            raise ShapeError(f"`{name}` does not advance to the next step")


def _clocks_at_zero(num_streams: int) -> list[Clock]:
    return [[0] * num_streams for _ in range(num_streams)]


def _writes(touch: Touch) -> bool:
    return touch[1] == "write"


def _is_before(epoch: Epoch, clock: Clock) -> bool:
    stream, number = epoch
    return clock[stream] >= number
