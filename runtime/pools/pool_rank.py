"""One rank of a pool: what it sends of its caches to the ranks of the other pool, and samples.

Prompts go one way, answers the other; either way the rank that sends has the same bytes of each
unit as the one that receives. All ranks of a pool do the same with the heads that they hold. Rank 0
says what, in orders that are JSON, and obeys them like the others.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tokenspeed_plan.plans.errors import PoolError
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.plans.validate.pool_rules import CACHE_ARENAS
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory
from tokenspeed_plan.runtime.pools.blocks import PAGES, STATES, Pair, copies, routes
from tokenspeed_plan.runtime.pools.samples import Sample, Sampler
from tokenspeed_plan.runtime.pools.transport import Pending, Route, Transport

TRANSPORTS = ("shm", "nixl")
RankOrder = dict[str, Any]


def cache_arenas(memory: PlanMemory) -> dict[str, Tensor]:
    """What is handed over lies in these, u8 each."""
    found = {name: memory.arena(name) for name in CACHE_ARENAS}
    return {name: arena for name, arena in found.items() if arena.numel()}


def make_transport(name: str, memory: PlanMemory) -> Transport:
    """The transport of a rank, with its caches registered.

    Raises:
        PoolError: its package is missing, or it does not work here.
    """
    arenas = cache_arenas(memory)
    if name == "nixl":
        from tokenspeed_plan.runtime.pools.nixl_transport import NixlTransport

        return NixlTransport(arenas)
    if name == "shm":
        from tokenspeed_plan.runtime.pools.shared_transport import SharedTransport

        return SharedTransport(arenas, memory.paths)
    raise PoolError(f"there is no transport `{name:.40}`", f"one of {', '.join(TRANSPORTS)}")


@dataclass(frozen=True, slots=True)
class Move:
    """Slots whose content goes to a peer.

    Attributes:
        job: the number of the hand-over.
        caller: the number of the peer, by which its memory was opened.
        pages: of this pool.
        targets: the page of the peer that each goes to.
        state_slot: of this pool; 0 where no state goes.
        state_target: the peer's.
        is_last: whether the hand-over has nothing after it.
        sampled: all pages of the hand-over, of the last one; none where these are all.
    """

    job: int
    caller: int
    pages: Sequence[int]
    targets: Sequence[int]
    state_slot: int = 0
    state_target: int = 0
    is_last: bool = False
    sampled: Sequence[int] = ()


@dataclass(slots=True)
class _Part:
    """What this rank has to do with a hand-over.

    `fault` says why it cannot be finished; `total` is the number of its sample.
    """

    caller: int = 0
    pending: list[Pending] = field(default_factory=list)
    sample: Sample | None = None
    is_over: bool = False
    fault: str = ""
    total: int | None = None


class PoolRank:
    """The part of one rank in all hand-overs.

    Args:
        plan: with both pools.
        memory: of this rank, whose pool is one of them.
        rank: its number in that pool.
        transport: how it reaches the ranks of the other pool, or is reached.
    """

    def __init__(self, plan: Plan, memory: PlanMemory, rank: int, transport: Transport) -> None:
        self.transport = transport
        self._routes: dict[int, list[Route]] = {}
        self._parts: dict[int, _Part] = {}
        self._next: list[Move] = []
        own, other = plan.pools
        if memory.plan.pool.role == "prefill":
            own, other = other, own
        others = range(other.layout.num_ranks)
        self._pairs: list[list[Pair]] = [routes(own, other, rank, each) for each in others]
        sent = {f"{rank}/{each}": [one for one, _ in self._pairs[each]] for each in others}
        received = {
            f"{each}/{rank}": [two for _, two in routes(other, own, each, rank)] for each in others
        }
        self._sent = Sampler(cache_arenas(memory), sent)
        self._received = Sampler(cache_arenas(memory), received)

    @property
    def jobs(self) -> list[int]:
        """The hand-overs that it has to do with."""
        return list(self._parts)

    def obey(self, order: RankOrder) -> None:
        """Carry out an order.

        Raises:
            PoolError: a peer's memory cannot be reached.
        """
        match order["do"]:
            case "open":
                reached = [self.transport.reach(each) for each in order["memory"]]
                self._routes[order["caller"]] = reached
            case "close":
                self._close(order["caller"])
            case "next":
                self._next = [Move(**move) for move in order["moves"]]
            case "push":
                move = Move(**order["move"])
                self.push([move])
                self.finish([move])
            case "stop":
                self._parts.setdefault(order["job"], _Part()).is_over = True
            case "sample":
                sample = self._received.take(order["pages"], order["state_slot"])
                self._parts[order["job"]] = _Part(sample=sample, is_over=True)

    def take_moves(self) -> list[Move]:
        """What leaves of the step that is launched now."""
        moves, self._next = self._next, []
        return moves

    def push(self, moves: Sequence[Move], buffers: Collection[str] | None = None) -> None:
        """Start to send, on a GPU after what was launched so far; of all buffers, or of some."""
        for move in moves:
            part = self._parts.setdefault(move.job, _Part(move.caller))
            part.caller = move.caller
            try:
                self._push(move, buffers, part)
            except PoolError as error:
                part.fault = error.message

    def _push(self, move: Move, buffers: Collection[str] | None, part: _Part) -> None:
        if move.caller not in self._routes:
            raise PoolError("a peer's memory could not be reached", "its error stands above")
        for route, pairs in zip(self._routes[move.caller], self._pairs, strict=True):
            chosen = pairs
            if buffers is not None:
                chosen = [pair for pair in pairs if pair[0].buffer in buffers]
            found = copies(chosen, PAGES, move.pages, move.targets)
            if move.state_slot:
                found += copies(chosen, STATES, [move.state_slot], [move.state_target])
            if found:
                part.pending.append(route.push(found))

    def finish(self, moves: Sequence[Move]) -> None:
        """All buffers of these are on their way; of the last of a hand-over some bytes are read."""
        for move in moves:
            if move.is_last:
                part = self._parts[move.job]
                part.sample = self._sent.take(
                    move.sampled or move.pages, move.state_slot, is_ahead=True
                )
                part.is_over = True

    def settle(self, job: int) -> int | None:
        """The number of what was sampled, once nothing of a hand-over is under way; None before.

        Raises:
            PoolError: some of it will not get there.
        """
        part = self._parts.get(job)
        if part is None:
            return None
        if part.fault:
            raise PoolError(part.fault, "see that both pools run")
        part.pending = [each for each in part.pending if not each.is_done()]
        if part.total is None and part.sample is not None and part.sample.is_ready:
            part.total = part.sample.total()
        if part.pending or not part.is_over:
            return None
        return 0 if part.sample is None else part.total

    def forget(self, job: int) -> None:
        """Know nothing more of a hand-over of which nothing is under way."""
        self._parts.pop(job, None)

    def _close(self, caller: int) -> None:
        """Write nothing more to a peer."""
        for route in self._routes.pop(caller, []):
            route.close()
        self._parts = {job: part for job, part in self._parts.items() if part.caller != caller}
