"""Plans with a second tier of the prefix cache, and copies that are over only much later."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from symbolic import SymbolicExecutor

from tokenspeed_plan.plans.schema import HostCache, Plan
from tokenspeed_plan.runtime import Engine
from tokenspeed_plan.runtime.cache.slot_copies import Copying, SlotCopy
from tokenspeed_plan.runtime.execution.host_slots import HostSlots

WRONG = -7  # where a copy is on its way


def with_host(plan: Plan, num_pages: int, num_states: int, least_tokens: int = 16) -> Plan:
    """The plan with so much on the host; none without pages."""
    if not num_pages:
        return plan.with_pool(host_cache=None)
    state_bytes = plan.pool.slot_bytes("state")
    cache = HostCache(
        num_pages=num_pages,
        num_states=num_states if state_bytes else 0,
        page_bytes=plan.pool.slot_bytes("kv_cache"),
        state_bytes=state_bytes,
        staging_pages=3,
        least_tokens=least_tokens,
        bytes_per_s=1e9,
    )
    return plan.with_pool(host_cache=cache)


@dataclass
class LateCopy:
    """Copies at its very end, which comes after some looks at it, or when it is waited for."""

    is_load: bool
    number: int
    copy: Callable[[], object]
    looks_left: int
    is_over: bool = False

    def is_done(self) -> bool:
        self.looks_left -= 1
        if self.looks_left < 0:
            self.wait()
        return self.is_over

    def wait(self) -> None:
        if not self.is_over:
            self.copy()
        self.is_over = True


class LateSlots:
    """Copies late; until then there is nothing right where they go."""

    def __init__(self, inner: HostSlots, seed: int) -> None:
        self.inner = inner
        self.open: list[LateCopy] = []
        self._random = random.Random(seed)
        self._number = 0

    def start(self, copy: SlotCopy) -> LateCopy:
        self._poison(copy)
        self._number += 1
        late = LateCopy(
            copy.is_load, self._number, lambda: self.inner.start(copy), self._random.randrange(6)
        )
        self.open.append(late)
        return late

    def end(self, is_load: bool, number: int) -> None:
        (found,) = [each for each in self.open if each.number == number]
        assert found.is_over and found.is_load == is_load
        self.open.remove(found)

    def _poison(self, copy: SlotCopy) -> None:
        inner = self.inner
        if not copy.is_load:
            inner._pages[list(copy.host_pages)] = WRONG
            inner._slots[copy.host_slot - 1 : copy.host_slot] = 255
            return
        for layer in inner._layers:
            layer[list(copy.pages)] = WRONG
        for state in inner._states:
            state[copy.state_slot] = 255


def late(engine: Engine, seed: int = 0) -> LateSlots:
    """Let the copies of an engine on the CPU end late."""
    assert isinstance(engine.executor._host, HostSlots)
    slots = LateSlots(engine.executor._host, seed)
    engine.executor._host = slots  # type: ignore[assignment]
    return slots


class TieredExecutor(SymbolicExecutor):
    """Names instead of numbers on the host, too; copies end late."""

    def __init__(self, plan: Plan, seed: int = 0) -> None:
        super().__init__(plan)
        self.host_keys: dict[tuple[int, int], tuple[int, int]] = {}
        self.host_state: dict[int, int] = {}
        self.num_copies = 0
        self._random = random.Random(seed)

    def start_copy(self, copy: SlotCopy) -> Copying:
        assert copy.host_slot > 0 and copy.state_slot > 0
        assert len(copy.pages) == len(copy.host_pages)
        keys, states = (self.host_keys, self.host_state)
        if copy.is_load:
            keys, states = self.keys, self.state
        for page in copy.pages if copy.is_load else copy.host_pages:
            for place in range(self.limits.page_size):
                keys[page, place] = (WRONG, WRONG)
        states[copy.state_slot if copy.is_load else copy.host_slot] = WRONG
        self.num_copies += 1
        looks = self._random.choice((0, 0, 1, 5))
        return LateCopy(copy.is_load, self.num_copies, lambda: self._move(copy), looks)

    def _move(self, copy: SlotCopy) -> None:
        for page, host_page in zip(copy.pages, copy.host_pages, strict=True):
            for place in range(self.limits.page_size):
                here, there = (page, place), (host_page, place)
                if copy.is_load:
                    self.keys[here] = self.host_keys[there]
                else:
                    self.host_keys[there] = self.keys.get(here, (WRONG, WRONG))
        if copy.is_load:
            self.state[copy.state_slot] = self.host_state[copy.host_slot]
        else:
            self.host_state[copy.host_slot] = self.state[copy.state_slot]

    def end_copy(self, copying: Copying) -> None:
        assert isinstance(copying, LateCopy) and copying.is_over
