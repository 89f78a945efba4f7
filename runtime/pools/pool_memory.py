"""The caches of one pool, as another pool writes them or is written from them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from tokenspeed_plan.plans.errors import PoolError
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.plans.validate.pool_rules import CACHE_ARENAS, cached_tensors
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory
from tokenspeed_plan.runtime.pools.blocks import PAGES, STATES, Copies, Unit, copies, routes
from tokenspeed_plan.runtime.pools.samples import Sampler
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

    Attributes:
        has_state: whether there is recurrent state to hand over.
        sampler: reads some of what was handed over.
    """

    def __init__(self, plan: Plan, memory: PlanMemory) -> None:
        decode, prefill = plan.pools
        self._routes: list[tuple[Unit, Unit]] = routes(prefill, decode)
        common = cached_tensors(decode).keys() & cached_tensors(prefill).keys()
        states = self._tensors(memory, STATES, common)
        self.has_state = bool(states)
        self.sampler = Sampler(self._tensors(memory, PAGES, common), states)

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
