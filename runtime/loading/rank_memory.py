"""Allocates the arenas of one rank; peers share one of them."""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.schema import ArenaSpec, Plan
from tokenspeed_plan.plans.validate.pool_rules import CACHE_ARENAS
from tokenspeed_plan.runtime.execution.arenas import Arenas
from tokenspeed_plan.runtime.execution.peer_arenas import NoPeerMemory, PeerMemory
from tokenspeed_plan.runtime.execution.rank_links import Links
from tokenspeed_plan.runtime.execution.shared_bytes import create

WITHOUT_PEERS = (
    "collectives of a library add up the ranks in place of kernels that push, which takes longer "
    "(`tokenspeed show DIR --why all_reduce`)"
)


class RankMemory:
    """The allocations of a rank.

    Args:
        plan: has their sizes.
        links: to the other ranks.

    Attributes:
        peers: what the ranks share, once it is allocated; None where the plan has nothing of that,
            and where peer memory does not work here.
    """

    def __init__(self, plan: Plan, links: Links) -> None:
        self.peers: PeerMemory | None = None
        self._plan = plan
        self._links = links

    def allocate(self) -> Arenas:
        """All arenas, as zeros.

        Raises:
            PlanError: there is not as much memory as the plan needs.
            RankError: a rank is lost.
        """
        plan, given, paths = self._plan, dict[str, Tensor](), dict[str, str]()
        for arena in plan.pool.arenas:
            if arena.name == "symmetric" and arena.size_bytes:
                self.peers = self._peers(arena.size_bytes)
            if arena.name == "symmetric" and self.peers is not None:
                given[arena.name] = self.peers.own
            if self._is_written_by_peers(arena):
                given[arena.name], paths[arena.name] = _shared(arena)
        return Arenas(plan.pool.arenas, plan.target.device, given, paths)

    def _is_written_by_peers(self, arena: ArenaSpec) -> bool:
        """Whether another pool writes it: on a CPU it then lies in shared memory."""
        pool, device = self._plan.pool, self._plan.target.device
        is_cache = arena.name in CACHE_ARENAS and arena.size_bytes > 0
        is_written = pool.role == "decode" or pool.answer_returns is not None
        return is_written and device == "cpu" and is_cache

    def _peers(self, size_bytes: int) -> PeerMemory | None:
        """The memory that ranks share; where it does not work, said once, the library adds up."""
        try:
            return self._links.peer_memory(size_bytes, self._plan.target.device)
        except NoPeerMemory as error:
            if self._links.rank == 0:
                print(f"warning: {error.message}; {WITHOUT_PEERS}", file=sys.stderr, flush=True)
            return None


def _shared(arena: ArenaSpec) -> tuple[Tensor, str]:
    try:
        mapped, path = create(arena.size_bytes)
    except (OSError, ValueError) as error:
        raise PlanError(
            f"cannot share {arena.size_bytes} bytes for `{arena.name}`: {error}",
            "end other processes, or plan for less: lower `workload.concurrency`",
        ) from error
    return torch.from_numpy(np.frombuffer(mapped, np.uint8)), path
