"""The caches of one pool, as another pool writes them or is written from them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from tokenspeed_plan.plans.errors import PoolError
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.plans.validate.pool_rules import CACHE_ARENAS, cached_tensors
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory
from tokenspeed_plan.runtime.pools.blocks import PAGES, STATES, Copies, Unit, copies, routes
from tokenspeed_plan.runtime.pools.samples import sample_digest
from tokenspeed_plan.runtime.pools.transport import Transport

TRANSPORTS = ("shm", "nixl")


def make_transport(name: str, memory: PlanMemory) -> Transport:
    """The transport of a pool, with its caches registered.

    Raises:
        PoolError: its package is missing, or it does not work here.
    """
    arenas = {name: memory.arena(name) for name in CACHE_ARENAS if memory.arena(name).numel()}
    if name == "nixl":
        from tokenspeed_plan.runtime.pools.nixl_transport import NixlTransport

        return NixlTransport(arenas)
    if name == "shm":
        from tokenspeed_plan.runtime.pools.shared_transport import SharedTransport

        return SharedTransport(arenas, memory.paths)
    raise PoolError(f"there is no transport `{name:.40}`", f"one of {', '.join(TRANSPORTS)}")


class PoolMemory:
    """The caches that two pools have in common, as one of them holds them.

    Args:
        plan: with both pools.
        memory: of this process, whose pool is one of them.
    """

    def __init__(self, plan: Plan, memory: PlanMemory) -> None:
        decode, prefill = plan.pools
        self._routes: list[tuple[Unit, Unit]] = routes(prefill, decode)
        common = cached_tensors(decode).keys() & cached_tensors(prefill).keys()
        self._pages = self._tensors(memory, PAGES, common)
        self._states = self._tensors(memory, STATES, common)

    @property
    def has_state(self) -> bool:
        """Whether there is recurrent state to hand over."""
        return bool(self._states)

    def digest(self, pages: Sequence[int], state_slot: int) -> str:
        """Of some of these pages, and of a state; see `sample_digest`."""
        return sample_digest(self._pages, self._states, pages, state_slot)

    def page_copies(self, sources: Sequence[int], targets: Sequence[int]) -> Copies:
        """Of pages of the prefill pool to pages of the decode pool."""
        return copies(self._routes, PAGES, sources, targets)

    def state_copies(self, source: int, target: int) -> Copies:
        """Of a state."""
        return copies(self._routes, STATES, [source], [target])

    def _tensors(self, memory: PlanMemory, arena: str, names: Collection[str]) -> list[Tensor]:
        buffers = [buffer for buffer in memory.plan.pool.buffers if buffer.arena == arena]
        wanted = sorted(buffer.name for buffer in buffers if buffer.name in names)
        return [memory.buffer(name) for name in wanted]
