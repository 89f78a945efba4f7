"""Two pools of a plan in one process: the prefill pool on a thread, the other for the test."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from conftest import make_spec
from conversations import check_all_is_given_back, poisoned
from planning import planned

from tokenspeed_plan.plans.errors import PoolError
from tokenspeed_plan.plans.schema import AnswerReturns, Plan
from tokenspeed_plan.runtime import Engine
from tokenspeed_plan.runtime.pools.blocks import Copy
from tokenspeed_plan.runtime.pools.handovers import Handovers, PeerOptions, make_handovers
from tokenspeed_plan.runtime.pools.pool_rank import make_transport
from tokenspeed_plan.runtime.pools.prefill_server import PrefillServer, make_prefill_server
from tokenspeed_plan.runtime.pools.transport import Pending, Route, Transport

TWO_POOLS: dict[str, Any] = {"target": {"count": 2}, "disaggregation": {"prefill": 1, "decode": 1}}
Spoil = Callable[[Transport], Transport]


def returning(plan: Plan, **changes: Any) -> Plan:
    """The plan with answers that go back to its prefill pool, and are waited for."""
    decode, prefill = plan.pools
    planned: dict[str, Any] = {"slots": 4, "least_tokens": 16, "token_us": 2e5}
    answers = AnswerReturns(**planned | changes)
    pools = (decode, prefill.model_copy(update={"answer_returns": answers}))
    return plan.model_copy(update={"pools": pools})


def squeezed_prefill(plan: Plan, num_pages: int) -> Plan:
    """The plan with fewer pages in its prefill pool."""
    decode, prefill = plan.pools
    limits = prefill.limits.model_copy(update={"num_pages": num_pages})
    return plan.model_copy(
        update={"pools": (decode, prefill.model_copy(update={"limits": limits}))}
    )


@cache
def plan_of_two(folder: Path, depth: int = 0, rollback: str = "snapshot") -> Plan:
    """A plan of two pools."""
    speculation: Any = {"depth": depth, "rollback": rollback} if depth else "off"
    spec = make_spec(folder, speculation=speculation, **TWO_POOLS)
    return planned(spec)


class Pools:
    """A decode pool and its prefill pools.

    Attributes:
        engine: of the decode pool, with poisoned memory, unless that is elsewhere.
        prefills, servers: of the prefill pools.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        token: str = "t",
        spoil: Spoil = lambda each: each,
        transport: str = "shm",
        engine: bool = True,
    ) -> None:
        self.plan, self.folder, self.token, self.spoil = plan, folder, token, spoil
        self.transport = transport
        self._engine = poisoned(plan, folder) if engine else None
        self.prefills: list[Engine] = []
        self.servers: list[PrefillServer] = []
        self._threads: list[threading.Thread] = []
        self._listeners: list[socket.socket] = []

    @property
    def engine(self) -> Engine:
        assert self._engine is not None
        return self._engine

    def add_prefill(self, plan: Plan | None = None, chunk: int = 48) -> tuple[str, int]:
        """Start a prefill pool; returns its address. Pages leave after each chunk."""
        engine = Engine.from_plan(self.plan, self.folder, chunk=chunk, role="prefill")
        transport = self.spoil(make_transport(self.transport, engine.executor.memory))
        server = make_prefill_server(engine, plan or self.plan, transport, self.token)
        listener = socket.create_server(("127.0.0.1", 0))
        thread = threading.Thread(target=server.serve, args=(listener,), daemon=True)
        thread.start()
        self.prefills.append(engine)
        self.servers.append(server)
        self._threads.append(thread)
        self._listeners.append(listener)
        host, port = listener.getsockname()
        return host, port

    def connect(
        self,
        addresses: Sequence[tuple[str, int]],
        spoil: Spoil = lambda each: each,
        **options: Any,
    ) -> Handovers:
        """Let the decode pool use them; `spoil` is of what it sends."""
        transport = spoil(make_transport(self.transport, self.engine.executor.memory))
        peers = PeerOptions(tuple(addresses), **{"token": self.token, "retry_s": 0.05} | options)
        handovers = make_handovers(self.engine, self.plan, transport, peers)
        handovers.start()
        self.engine.loop.elsewhere = handovers
        return handovers

    def stop(self) -> None:
        """End all of it."""
        if self._engine is not None:
            self._engine.loop.close()
        self.stop_prefills()
        for listener in self._listeners:
            listener.close()

    def stop_prefills(self) -> None:
        """End the prefill pools; where they listened stays open."""
        for server, thread in zip(self.servers, self._threads, strict=True):
            server.stop()
            thread.join(5)


@contextmanager
def pools(
    plan: Plan,
    folder: Path,
    spoil: Spoil = lambda each: each,
    transport: str = "shm",
    engine: bool = True,
) -> Iterator[Pools]:
    made = Pools(plan, folder, spoil=spoil, transport=transport, engine=engine)
    try:
        yield made
    finally:
        made.stop()


def wait_for(holds: Callable[[], bool], engine: Engine | None = None, seconds: float = 5) -> None:
    """Wait until something holds; the engine goes on meanwhile."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        if engine is not None:
            engine.step()
        time.sleep(0.002)


def nothing_is_held(made: Pools) -> None:
    """Both sides have given everything back."""
    elsewhere, scheduler = made.engine.loop.elsewhere, made.engine.scheduler
    wait_for(lambda: elsewhere is None or not elsewhere.is_open, made.engine)
    wait_for(lambda: not scheduler.reservations.abandoned, made.engine)
    for own in (scheduler, *(prefill.scheduler for prefill in made.prefills)):
        held = own.reservations
        wait_for(
            lambda own=own, held=held: (  # type: ignore[misc]
                not own.num_unfinished and not held.held and not held.lent and not held.abandoned
            )
        )
        assert not held.lent_states
        check_all_is_given_back(own.cache)


class Gated:
    """A transport whose pushes are over once a gate is open."""

    def __init__(self, inner: Transport, gate: threading.Event) -> None:
        self.name, self.settle_s = inner.name, inner.settle_s
        self._inner, self._gate = inner, gate

    def describe(self) -> dict[str, Any]:
        return self._inner.describe()

    def reach(self, description: dict[str, Any]) -> Route:
        return _GatedRoute(self._inner.reach(description), self._gate)


class _GatedRoute:
    def __init__(self, inner: Route, gate: threading.Event) -> None:
        self._inner, self._gate = inner, gate

    def push(self, parts: Sequence[Copy]) -> Pending:
        return _GatedPending(self._inner.push(parts), self._gate)

    def close(self) -> None:
        self._inner.close()


class _GatedPending:
    def __init__(self, inner: Pending, gate: threading.Event) -> None:
        self._inner, self._gate = inner, gate

    def is_done(self) -> bool:
        return self._gate.is_set() and self._inner.is_done()


class Spoiled:
    """A transport whose pushes now and then write something else, or fail."""

    def __init__(self, inner: Transport, chance: float, fails: bool) -> None:
        self.name, self.settle_s = inner.name, inner.settle_s
        self._inner, self._chance, self._fails = inner, chance, fails
        self._rng = random.Random(7)

    def describe(self) -> dict[str, Any]:
        return self._inner.describe()

    def reach(self, description: dict[str, Any]) -> Route:
        return _SpoiledRoute(self._inner.reach(description), self._is_bad, self._fails)

    def _is_bad(self) -> bool:
        return self._rng.random() < self._chance


class _SpoiledRoute:
    def __init__(self, inner: Route, is_bad: Callable[[], bool], fails: bool) -> None:
        self._inner, self._is_bad, self._fails = inner, is_bad, fails

    def push(self, parts: Sequence[Copy]) -> Pending:
        if not self._is_bad():
            return self._inner.push(parts)
        if self._fails:
            raise PoolError("the link is gone", "plug it in again")
        return self._inner.push([part._replace(source=0) for part in parts])

    def close(self) -> None:
        self._inner.close()
