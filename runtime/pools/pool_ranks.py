"""All ranks of a pool: rank 0 tells the others what it does itself, and reads how far they are."""

from __future__ import annotations

import json
import sys
from typing import Any, Protocol

import torch

from tokenspeed_plan.plans.errors import PoolError
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.execution.executor import Executor
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory
from tokenspeed_plan.runtime.execution.rank_links import Links, joined
from tokenspeed_plan.runtime.execution.ranks import BESIDE
from tokenspeed_plan.runtime.execution.shared_bytes import share
from tokenspeed_plan.runtime.pools.blocks import PAGES, STATES, handed_bytes
from tokenspeed_plan.runtime.pools.layer_launch import LayerLaunch
from tokenspeed_plan.runtime.pools.pool_rank import PoolRank, RankOrder, make_transport
from tokenspeed_plan.runtime.pools.rank_reports import MAX_JOBS, RankReports, report_bytes
from tokenspeed_plan.runtime.pools.samples import MODULUS
from tokenspeed_plan.runtime.pools.transport import Sending, Transport


class Event(Protocol):
    """A moment in what a device does."""

    def query(self) -> bool:
        """Whether it has come to it."""


class Ranks(Protocol):
    """All ranks of a pool; a simulation has such without memory. See `PoolRanks`."""

    transport: Sending
    descriptions: list[dict[str, Any]]
    page_bytes: int
    state_bytes: int

    @property
    def is_full(self) -> bool:
        """Whether there is no place for another hand-over."""

    def begin(self) -> int:
        """The number of a new hand-over."""

    def forget(self, job: int) -> None:
        """Know nothing more of a hand-over of which nothing is under way."""

    def do(self, order: RankOrder) -> None:
        """Let every rank carry out an order."""

    def result(self, job: int) -> str | None:
        """The digest of a hand-over, once no rank has anything of it under way; None before."""

    def launched(self) -> Event | None:
        """A moment after everything that was launched so far; None where nothing is on its way."""


class PoolRanks:
    """The ranks of a pool, as rank 0 leads them.

    Args:
        plan: with both pools.
        memory: of this rank.
        transport: of this rank.

    Attributes:
        own: the part of this rank.
        transport: of this rank.
        descriptions: of the memory of each rank, for the other pool.
        page_bytes: that all ranks hand over for a page.
        state_bytes: for a state; 0 where there is none.
    """

    def __init__(self, plan: Plan, memory: PlanMemory, transport: Transport) -> None:
        self._links = joined()
        self._world = memory.plan.target.count
        self._is_on_gpu = plan.target.device == "cuda"
        self.transport: Sending = transport
        self._tell({"do": "join", "transport": transport.name})
        self.own = PoolRank(plan, memory, self._links.rank, transport)
        self.descriptions, self._reports = _meet(self._links, transport, self._world)
        decode, prefill = plan.pools
        sizes = handed_bytes(prefill, decode)
        if memory.plan.pool.role == "decode":
            sizes = handed_bytes(decode, prefill)
        self.page_bytes, self.state_bytes = sizes[PAGES], sizes[STATES]
        self._number = 0
        self._places: set[int] = set()  # of the reports of those that are not forgotten

    @property
    def is_full(self) -> bool:
        """Whether there is no place for another hand-over."""
        return len(self._places) == MAX_JOBS

    def begin(self) -> int:
        """The number of a new hand-over; no other one has its place among the reports."""
        self._number += 1
        while self._number % MAX_JOBS in self._places:
            self._number += 1
        self._places.add(self._number % MAX_JOBS)
        return self._number

    def forget(self, job: int) -> None:
        """Know nothing more of a hand-over of which nothing is under way."""
        self.own.forget(job)
        self._places.discard(job % MAX_JOBS)

    def do(self, order: RankOrder) -> None:
        """Let every rank carry out an order.

        Raises:
            PoolError: this one cannot.
        """
        self._tell(order)
        self.own.obey(order)

    def launched(self) -> Event | None:
        """An event after everything that was launched so far; a CPU has nothing on its way."""
        if not self._is_on_gpu:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _tell(self, order: RankOrder) -> None:
        if self._links.orders is not None:
            content = json.dumps(order, allow_nan=False, separators=(",", ":")).encode()
            self._links.orders.write((BESIDE, 0, 0), content)

    def result(self, job: int) -> str | None:
        """The digest of a hand-over, once no rank has anything of it under way; None before.

        Raises:
            PoolError: some of it will not get there.
        """
        total = self.own.settle(job)
        for rank in range(1, self._world):
            found = self._reports.find(rank, job)
            if found is None or total is None:
                return None
            is_right, part = found
            if not is_right:
                raise PoolError(f"rank {rank} does not reach a peer", "its error stands above")
            total += part
        return None if total is None else f"{total % MODULUS:032x}"


class PoolFollower:
    """Another rank of a pool: it carries out what rank 0 says, beside its replays.

    Args:
        plan: with both pools.
        executor: of this rank.
    """

    def __init__(self, plan: Plan, executor: Executor) -> None:
        self._plan = plan
        self._executor = executor
        self._links = joined()
        self._own: PoolRank | None = None
        self._reports: RankReports | None = None

    def obey(self, content: bytes) -> None:
        """Carry out an order; what cannot be done is reported with the hand-over that needs it."""
        order: dict[str, Any] = json.loads(content)
        if self._own is None:
            self._join(order["transport"])
            return
        try:
            self._own.obey(order)
        except PoolError as error:
            print(f"rank {self._links.rank}: {error.message}", file=sys.stderr, flush=True)

    def _join(self, name: str) -> None:
        executor, memory = self._executor, self._executor.memory
        transport = make_transport(name, memory)
        self._own = PoolRank(self._plan, memory, self._links.rank, transport)
        _, self._reports = _meet(self._links, transport, memory.plan.target.count)
        executor.launch = LayerLaunch(executor.launch, self._own)

    def poll(self) -> None:
        """Report what is over."""
        own, reports, rank = self._own, self._reports, self._links.rank
        if own is None or reports is None:
            return
        for job in own.jobs:
            try:
                total = own.settle(job)
            except PoolError:
                reports.leave(rank, job, None)
                continue
            if total is not None:
                reports.leave(rank, job, total)
                own.forget(job)


def _meet(
    links: Links, transport: Transport, world: int
) -> tuple[list[dict[str, Any]], RankReports]:
    """What each rank says of its memory, and where they report; every rank calls it."""
    text = json.dumps(transport.describe(), allow_nan=False)
    found = [json.loads(each) for each in links.exchange(text)]
    size_bytes = 0 if links.rank else report_bytes(world)
    return found, RankReports(share(size_bytes, links.exchange)[0])
