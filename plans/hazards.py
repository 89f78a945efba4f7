"""One symbolic replay of a program: who wrote each byte, and is that ordered before who reads it.

Steps on one stream run in order; streams are ordered only by events. As in a race detector (vector
clocks: Mattern, 1988; FastTrack: Flanagan and Freund, PLDI 2009), each access carries the time of
its stream, and two accesses to the same bytes, one of them a write, must be ordered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenspeed_plan.plans.ops import BATCH_STATE, Access, require
from tokenspeed_plan.plans.schema import (
    BufferSpec,
    CollectiveCall,
    KernelCall,
    KernelSpec,
    Program,
    RecordEvent,
    Step,
    WaitEvent,
)

Clock = list[int]
Epoch = tuple[int, int]  # stream, time


def check_hazards(
    program: Program, kernels: Mapping[str, KernelSpec], buffers: Mapping[str, BufferSpec]
) -> None:
    """Refuse a program whose result depends on anything but its steps.

    Raises:
        ShapeError: a read of what was not written or was overwritten, a race, or an event without
            its partner.
    """
    _check_early(program, kernels)
    replay = _Replay(program, buffers)
    for step in program.steps:
        replay.run(step, _accesses(step, kernels), _slots(step, kernels))
    replay.finish()


def _check_early(program: Program, kernels: Mapping[str, KernelSpec]) -> None:
    """What a kernel reads before its predecessor is done must be older than that one."""
    before: dict[int, Step] = {}
    for step in program.steps:
        launch = kernels[step.kernel].launch if isinstance(step, KernelCall) else None
        if isinstance(step, KernelCall) and launch is not None and launch.prefetch:
            places = step.places(kernels[step.kernel])
            last = before.get(step.stream)
            known = isinstance(last, KernelCall) and kernels[last.kernel].launch
            require(
                bool(known and known.trigger_after_wait),
                f"`{step.kernel}` reads ahead of a kernel that does not wait",
            )
            written = (
                {name for name, access in _accesses(last, kernels) if access != "read"}
                if last
                else set()
            )
            made = {places[name] for name in launch.prefetch if name in places} & written
            require(
                not made,
                f"`{step.kernel}` reads `{min(made, default='')}` ahead of the kernel that makes it",
            )
        if isinstance(step, (KernelCall, CollectiveCall)):
            before[step.stream] = step


def _accesses(step: Step, kernels: Mapping[str, KernelSpec]) -> list[tuple[str, Access]]:
    """The buffers that a step touches; weights are left out, they never change."""
    if isinstance(step, KernelCall):
        access: dict[str, Access] = {"input": "read", "output": "write"}
        params = zip(kernels[step.kernel].tensors, step.args, strict=True)
        return [(name, access.get(p.role, p.access)) for p, name in params if p.role != "weight"]
    if isinstance(step, CollectiveCall):
        return [(step.source, "read"), (step.target, "write")]
    return []


def _slots(step: Step, kernels: Mapping[str, KernelSpec]) -> dict[str, str]:
    """For each cache that a step writes, the buffer that says where."""
    if not isinstance(step, KernelCall):
        return {}
    kernel = kernels[step.kernel]
    args = step.places(kernel)
    writes = [part for part in kernel.parts if part.kind == "kv_write"]
    return {args[part.operands[3]]: args[part.operands[2]] for part in writes}


@dataclass(slots=True)
class _Span:
    """Bytes that a buffer holds, and everyone who touched them since they were written."""

    start: int
    end: int
    writer: Epoch
    readers: list[Epoch] = field(default_factory=list)


class _Replay:
    def __init__(self, program: Program, buffers: Mapping[str, BufferSpec]) -> None:
        self.program = program
        self.buffers = buffers
        self.clocks: list[Clock] = [[0] * program.num_streams for _ in range(program.num_streams)]
        self.started = [True] + [False] * (program.num_streams - 1)
        self.events: dict[int, Clock] = {}
        self.waited: set[int] = set()
        self.spans: list[_Span] = []
        self.intact: dict[str, _Span] = {}  # buffers whose bytes are all still their own
        self.written: set[str] = set()
        self.unread: set[str] = set()
        self.state: dict[str, Epoch] = {}
        self.readers: dict[str, list[Epoch]] = {}  # of a state since it was written
        self.filled: set[tuple[str, str]] = set()  # caches, and where they were written
        self.slots: dict[str, str] = {}
        self.input_readers: dict[str, list[Epoch]] = {}
        self.moved_on: set[str] = set()
        for name in program.inputs:
            require(
                name in buffers and buffers[name].arena == "io",
                f"input `{name}` is not an io buffer",
            )

    def run(self, step: Step, accesses: list[tuple[str, Access]], slots: dict[str, str]) -> None:
        clock = self.clocks[step.stream]
        self.slots = slots
        if isinstance(step, WaitEvent):
            self._wait(step, clock)
            return
        require(
            self.started[step.stream], f"stream {step.stream} works before it waits for another"
        )
        clock[step.stream] += 1
        if isinstance(step, RecordEvent):
            require(step.event not in self.events, f"event {step.event} is recorded twice")
            self.events[step.event] = list(clock)
        epoch = (step.stream, clock[step.stream])
        for name, access in sorted(
            accesses, key=lambda item: item[1] == "write"
        ):  # reads come before writes
            self._touch(name, access, epoch, clock)

    def _wait(self, step: WaitEvent, clock: Clock) -> None:
        require(
            step.event in self.events, f"event {step.event} is waited for and not recorded before"
        )
        clock[:] = map(max, clock, self.events[step.event])
        self.waited.add(step.event)
        self.started[step.stream] = True

    def _touch(self, name: str, access: Access, epoch: Epoch, clock: Clock) -> None:
        arena = self.buffers[name].arena
        if arena == "scratch":
            require(
                _before(self.state.get(name, (0, 0)), clock),
                f"`{name}` is used by two streams at once",
            )
            self.state[name] = epoch
        elif arena in ("kv_cache", "state"):
            self._touch_state(name, access, epoch, clock)
        elif access == "update":
            self._move_on(name, epoch, clock)
        elif access == "read":
            self._read(name, epoch, clock)
        else:
            self._write(name, epoch, clock)

    def _touch_state(self, name: str, access: Access, epoch: Epoch, clock: Clock) -> None:
        """A row of state is written once; a cache may be written again elsewhere, when all that was read is over."""
        if access == "read":
            require(
                name in self.state and _before(self.state[name], clock),
                f"`{name}` is read before it is written",
            )
            self.readers.setdefault(name, []).append(epoch)
            return
        where = self.slots.get(name)
        require(name not in self.state or where is not None, f"`{name}` is written twice")
        require(
            where is None or (name, where) not in self.filled,
            f"`{name}` is written twice at `{where}`",
        )
        for earlier in (*self.readers.pop(name, ()), *filter(None, [self.state.get(name)])):
            require(_before(earlier, clock), f"`{name}` is written while it may still be in use")
        self.filled.add((name, where or ""))
        self.state[name] = epoch

    def _read(self, name: str, epoch: Epoch, clock: Clock) -> None:
        if name in self.program.inputs:
            require(
                name not in self.moved_on, f"`{name}` is read after it moved on to the next step"
            )
            self.input_readers.setdefault(name, []).append(epoch)
            return
        self.unread.discard(name)
        require(name in self.written, f"`{name}` is read before it is written")
        require(name in self.intact, f"`{name}` is overwritten before it is read")
        span = self.intact[name]
        require(
            _before(span.writer, clock), f"`{name}` is read while another stream may still write it"
        )
        span.readers.append(epoch)

    def _move_on(self, name: str, epoch: Epoch, clock: Clock) -> None:
        """An input takes its value for the next replay; all that read this one's must be over."""
        require(
            name in self.program.inputs and name not in self.moved_on,
            f"`{name}` is not an input to move on",
        )
        readers = self.input_readers.get(name, [])
        require(
            all(_before(reader, clock) for reader in readers),
            f"`{name}` moves on while it may still be read",
        )
        self.moved_on.add(name)

    def _write(self, name: str, epoch: Epoch, clock: Clock) -> None:
        require(
            name not in self.written and name not in self.program.inputs,
            f"`{name}` is written twice",
        )
        self.written.add(name)
        self.unread.add(name)
        buffer = self.buffers[name]
        if buffer.arena == "io":
            self.intact[name] = _Span(0, 0, epoch)
            return
        size = buffer.tensor.size_bytes(self.program.max_tokens, self.program.max_seqs)
        span = _Span(buffer.offset_bytes, buffer.offset_bytes + size, epoch)
        self._claim(name, span, clock)
        self.intact[name] = span

    def _claim(self, name: str, new: _Span, clock: Clock) -> None:
        """Take the bytes from those who hold them; what they did there must be over."""
        kept: list[_Span] = []
        for span in self.spans:
            if span.end <= new.start or new.end <= span.start:
                kept.append(span)
                continue
            for epoch in (span.writer, *span.readers):
                require(
                    _before(epoch, clock) and epoch != new.writer,
                    f"`{name}` is written while its bytes may still be in use",
                )
            self.intact = {held: other for held, other in self.intact.items() if other is not span}
            kept += [
                _Span(a, b, span.writer, span.readers)
                for a, b in ((span.start, new.start), (new.end, span.end))
                if a < b
            ]
        self.spans = [*kept, new]

    def finish(self) -> None:
        """Everything must have come back to stream 0, the outputs in place."""
        end = self.clocks[0]
        for stream, clock in enumerate(self.clocks):
            require(clock[stream] <= end[stream], f"stream {stream} is not waited for at the end")
        unpaired = set(self.events) - self.waited
        require(not unpaired, f"event {min(unpaired, default=0)} is recorded and never waited for")
        if self.program.phase == "decode":
            left = {*BATCH_STATE, "state_lens"} & set(self.program.inputs) - self.moved_on
            require(not left, f"`{min(left, default='')}` does not move on to the next step")
        for name in self.program.outputs:
            require(name in self.intact, f"output `{name}` is not there at the end")
        wasted = self.unread - set(self.program.outputs)
        require(not wasted, f"`{min(wasted, default='')}` is written and never read")


def _before(epoch: Epoch, clock: Clock) -> bool:
    stream, time = epoch
    return clock[stream] >= time
