"""Whether the engine moves: a step loop that stands still while it has work is no healthy one."""

from __future__ import annotations

import time

from tokenspeed_plan.runtime.engine import Engine
from tokenspeed_plan.runtime.execution.rank_links import rank_fault
from tokenspeed_plan.runtime.serving.async_engine import AsyncEngine


class Progress:
    """Notes when the step loop has last moved; `note` is called several times a second."""

    def __init__(self, engine: Engine, async_engine: AsyncEngine) -> None:
        self._engine = engine
        self._async_engine = async_engine
        self._num_steps = -1
        self._moved_s = time.monotonic()

    def note(self) -> None:
        """Look at the step loop."""
        num_steps = self._engine.loop.num_moves
        has_work = bool(self._async_engine.num_open or self._engine.num_unfinished)
        if num_steps != self._num_steps or not has_work:
            self._num_steps = num_steps
            self._moved_s = time.monotonic()

    @property
    def stands_s(self) -> float:
        """For how long it has not moved although it has work."""
        return time.monotonic() - self._moved_s

    def fault(self, stall_s: float) -> str | None:
        """Why the engine is not healthy; `stall_s`: how long it may stand still."""
        if self.stands_s > stall_s:
            return f"the engine has not moved for {self.stands_s:.0f} s"
        return rank_fault()
