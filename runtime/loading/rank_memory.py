"""Allocates the arenas of one rank; peers share one of them."""

from __future__ import annotations

from torch import Tensor

from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.execution.arenas import Arenas
from tokenspeed_plan.runtime.execution.peer_arenas import PeerMemory
from tokenspeed_plan.runtime.execution.rank_links import Links


class RankMemory:
    """The allocations of a rank.

    Args:
        plan: has their sizes.
        links: to the other ranks.

    Attributes:
        peers: what the ranks share, once it is allocated; None where the plan has nothing of that.
    """

    def __init__(self, plan: Plan, links: Links) -> None:
        self.peers: PeerMemory | None = None
        self._plan = plan
        self._links = links

    def allocate(self) -> Arenas:
        """All arenas, as zeros.

        Raises:
            PlanError: there is not as much memory as the plan needs.
            RankError: the ranks cannot share memory.
        """
        plan, given = self._plan, dict[str, Tensor]()
        for arena in plan.pool.arenas:
            if arena.name == "symmetric" and arena.size_bytes:
                self.peers = self._links.peer_memory(arena.size_bytes, plan.target.device)
                given[arena.name] = self.peers.own
        return Arenas(plan.pool.arenas, plan.target.device, given)
