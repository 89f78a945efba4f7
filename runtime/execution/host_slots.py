"""The second tier of the prefix cache: slots in the memory of the host, and copies of them.

On a GPU each direction has a stream, which begins a copy when all that was launched before it is
done; nothing that is launched later waits, until it is told to. A page lies in one piece on the
host, with those of all layers side by side, and is gathered on the device first: so a copy over the
link is large, wherever pages lie. On a CPU a copy is over when it is started.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.schema import HostCache
from tokenspeed_plan.runtime.cache.slot_copies import SlotCopy
from tokenspeed_plan.runtime.execution.host_copy import index_on
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory

_WORD = torch.int64  # pages of a layer are gathered in words


@dataclass(frozen=True, slots=True, eq=False)
class LaneCopy:
    """A copy by its number among those of its direction; `event` comes after it on a GPU."""

    is_load: bool
    number: int
    event: torch.cuda.Event | None

    def is_done(self) -> bool:
        """Whether it is over."""
        return self.event is None or self.event.query()

    def wait(self) -> None:
        """Wait until it is over."""
        if self.event is not None:
            self.event.synchronize()


@dataclass(slots=True)
class _Lane:
    """One direction: its stream and staging pages, and its copies that nobody was told to await."""

    staging: Tensor
    stream: torch.cuda.Stream | None
    num_started: int = 0
    open: deque[LaneCopy] = field(default_factory=deque)

    def after_all_launched(self) -> AbstractContextManager[object]:
        """What is launched inside waits for all that was launched before."""
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.stream)


class HostSlots:
    """Slots of one rank.

    Args:
        spec: how many, and how large.
        memory: of the rank, with the caches.

    Raises:
        PlanError: the host has not as much memory.
    """

    def __init__(self, spec: HostCache, memory: PlanMemory) -> None:
        layers = memory.states("kv_cache")
        self._layers = [layer.flatten(1).view(_WORD) for layer in layers]
        self._states = [state.flatten(1).view(torch.uint8) for state in memory.states("state")]
        device = layers[0].device
        whole = _host_bytes(spec.size_bytes, device)
        if device.type == "cuda":
            release = weakref.finalize(self, _unpin, whole)
            release.atexit = False  # the driver lets go of it when the process ends
        page_area = spec.num_pages * spec.page_bytes
        self._pages = whole[:page_area].view(spec.num_pages, spec.page_bytes).view(_WORD)
        self._slots = whole[page_area:].view(spec.num_states, spec.state_bytes)
        self._lanes = [self._lane(spec, device) for _ in range(2)]

    def _lane(self, spec: HostCache, device: torch.device) -> _Lane:
        shape = (spec.staging_pages, self._pages.shape[1])
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        return _Lane(torch.empty(shape, dtype=_WORD, device=device), stream)

    def start(self, copy: SlotCopy) -> LaneCopy:
        """Start a copy on this rank."""
        lane = self._lanes[copy.is_load]
        event = None
        with lane.after_all_launched():
            for first in range(0, len(copy.pages), len(lane.staging)):
                part = slice(first, first + len(lane.staging))
                self._move_pages(lane, copy.is_load, copy.pages[part], copy.host_pages[part])
            for here, there in self._state_parts(copy.state_slot, copy.host_slot):
                _move(here, there, copy.is_load)
            if lane.stream is not None:
                event = torch.cuda.Event()
                event.record(lane.stream)
        lane.num_started += 1
        started = LaneCopy(copy.is_load, lane.num_started, event)
        lane.open.append(started)
        return started

    def end(self, is_load: bool, number: int) -> None:
        """Let what is launched from now on wait for a copy of this rank, and those before it."""
        waiting = self._lanes[is_load].open
        while waiting and waiting[0].number <= number:
            event = waiting.popleft().event
            if event is not None:
                torch.cuda.current_stream().wait_event(event)

    def _move_pages(
        self, lane: _Lane, is_load: bool, pages: Sequence[int], host_pages: Sequence[int]
    ) -> None:
        """Copy pages, at most as many as there are for staging."""
        index = index_on(lane.staging.device, pages)
        if not is_load:
            for layer, columns in self._columns():
                lane.staging[: len(pages), columns] = layer.index_select(0, index)
        for first, host, count in _runs(host_pages):
            staged = lane.staging[first : first + count]
            _move(staged, self._pages[host : host + count], is_load)
        if is_load:
            for layer, columns in self._columns():
                layer.index_copy_(0, index, lane.staging[: len(pages), columns])

    def _columns(self) -> Iterator[tuple[Tensor, slice]]:
        """The pages of each layer, and where they lie in a page of the host."""
        first = 0
        for layer in self._layers:
            width = layer.shape[1]
            yield layer, slice(first, first + width)
            first += width

    def _state_parts(self, slot: int, host_slot: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The slot of each layer here, and its place on the host."""
        first = 0
        for state in self._states:
            width = state.shape[1]
            yield state[slot], self._slots[host_slot - 1, first : first + width]
            first += width


def _move(here: Tensor, there: Tensor, is_load: bool) -> None:
    """Copy bytes of the device to the host, or back."""
    target, source = (here, there) if is_load else (there, here)
    target.copy_(source, non_blocking=True)


def _runs(pages: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Neighbours among pages: the place of the first in the list, its number, and how many."""
    first = 0
    for end in range(1, len(pages) + 1):
        if end == len(pages) or pages[end] != pages[end - 1] + 1:
            yield first, pages[first], end - first
            first = end


def _host_bytes(size_bytes: int, device: torch.device) -> Tensor:
    """Memory of the host; pinned for a GPU. PyTorch's own pinned memory comes in powers of two."""
    try:
        memory = torch.empty(size_bytes, dtype=torch.uint8)
        if device.type == "cuda":
            _pin(memory)
    except (RuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        raise PlanError(
            f"cannot take {size_bytes} bytes of the host for the prefix cache: {reason}",
            "plan with a smaller `serving.host_cache_gib`, which is for each rank",
        ) from error
    return memory


def _pin(memory: Tensor) -> None:
    status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(status):
        raise RuntimeError(f"CUDA pins no memory: {status}")


def _unpin(memory: Tensor) -> None:
    torch.cuda.synchronize()  # copies may be on their way
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
