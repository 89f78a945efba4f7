"""The replicas: started, watched, started again, and restarted one after the other."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.serving.router.replica_process import Life, Start

_LOG = logging.getLogger("tokenspeed_plan.router")
_READY = re.compile(r"ready at (http://\S+)/v1")
_LOOK_S = 0.5  # between two looks at a replica's health
_ANSWER_S = 5.0  # in which it must say how it is
_SHORT_LIFE_S = 10.0  # a replica that ends sooner is started again later each time
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
END_S = 15.0  # beyond its drain, in which a replica ends by itself
_SIGNAL_S = 0.3  # between two signals, which are one where they come together
_KEPT_LINES = 50  # of what it has printed last


@dataclass(frozen=True, slots=True)
class Launch:
    """How replicas are started.

    Attributes:
        count: how many.
        start: starts one of them.
        drain_s: what a replica leaves to its requests when it is told to end.
        key: what a replica wants of the router; None if it needs nothing.
    """

    count: int
    start: Start
    drain_s: float
    key: str | None = None


@dataclass(eq=False)
class Replica:
    """One engine with its server.

    Attributes:
        url: where it listens; None while it does not.
        is_healthy: whether it said so last.
        is_leaving: it gets no more requests, as it is restarted.
        restarts: how often it was started again.
    """

    index: int
    url: str | None = None
    is_healthy: bool = False
    is_leaving: bool = False
    restarts: int = 0
    life: Life | None = None
    printed: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES))

    @property
    def answers(self) -> bool:
        """Whether it listens, and is well."""
        return self.url is not None and self.is_healthy

    @property
    def is_up(self) -> bool:
        """Whether it takes requests."""
        return self.answers and not self.is_leaving

    @property
    def last_error(self) -> str:
        """The error that it printed last, or where it has none what it printed last."""
        lines = [line for line in self.printed if line.strip()] or ["it said nothing"]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines)[-1].removeprefix("error: ")


class Fleet:
    """All replicas.

    Args:
        launch: how they are started.
        client: for their health.
        lost: called with the number of a replica whose cache is gone.
    """

    def __init__(
        self, launch: Launch, client: httpx.AsyncClient, lost: Callable[[int], None]
    ) -> None:
        self.replicas = [Replica(index) for index in range(launch.count)]
        self.all_ready = asyncio.Event()
        self.error: RequestError | None = None
        self._launch = launch
        self._client = client
        self._lost = lost
        self._ending = False
        self._restarting = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def up(self) -> list[int]:
        """The replicas that take requests."""
        return [replica.index for replica in self.replicas if replica.is_up]

    def begin(self) -> None:
        """Start all of them."""
        for replica in self.replicas:
            self._tasks.append(asyncio.create_task(self._keep(replica)))
            self._tasks.append(asyncio.create_task(self._look_at(replica)))

    async def end(self) -> None:
        """Tell all of them to end, and wait until they have."""
        self._ending = True
        await asyncio.gather(*(self._end(replica) for replica in self.replicas))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def end_now(self) -> None:
        """Tell all of them twice, so that they end what they are at."""
        self._ending = True
        for _ in range(2):
            for replica in self.replicas:
                if replica.life is not None and not replica.life.has_ended:
                    replica.life.terminate()
            await asyncio.sleep(_SIGNAL_S)

    async def restart_all(self, num_in_flight: Callable[[int], int]) -> None:
        """Restart one after the other, each once it has no request left.

        `num_in_flight` counts the requests of a replica.
        """
        async with self._restarting:
            for replica in self.replicas:
                await self._restart(replica, num_in_flight)
            _LOG.warning("all replicas were restarted")

    async def _restart(self, replica: Replica, num_in_flight: Callable[[int], int]) -> None:
        replica.is_leaving = True
        try:
            while num_in_flight(replica.index):
                await asyncio.sleep(_LOOK_S / 10)
            restarts = replica.restarts
            await self._end(replica)
            while (replica.restarts == restarts or not replica.answers) and not self._ending:
                await asyncio.sleep(_LOOK_S / 10)
        finally:
            replica.is_leaving = False

    async def _end(self, replica: Replica) -> None:
        life = replica.life
        if life is None or life.has_ended:
            return
        life.terminate()
        try:
            async with asyncio.timeout(self._launch.drain_s + END_S):
                await life.wait()
        except TimeoutError:
            _LOG.warning("replica %d does not end, and is killed", replica.index)
            life.kill()
            await life.wait()

    async def _keep(self, replica: Replica) -> None:
        """Start a replica, and again whenever it ends."""
        pause_s = _FIRST_PAUSE_S
        while not self._ending:
            begun_s = time.monotonic()
            how = await self._live(replica)
            was_told_to = replica.is_leaving and replica.url is not None
            replica.url, replica.is_healthy = None, False
            self._lost(replica.index)
            if self._ending:
                return
            replica.restarts += 1
            if not self.all_ready.is_set() and not replica.is_leaving:
                self._fail(replica)
                return
            if was_told_to:
                continue
            _LOG.warning("replica %d %s; it is started again", replica.index, how)
            if time.monotonic() - begun_s > _SHORT_LIFE_S:
                pause_s = _FIRST_PAUSE_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _live(self, replica: Replica) -> str:
        """The life of a replica; returns how it has ended."""
        replica.printed.clear()
        replica.life = life = await self._launch.start(replica.index)
        async for line in life.lines():
            found = _READY.search(line)
            if found is None:
                replica.printed.append(line)
                if line:
                    _LOG.warning("[replica %d] %s", replica.index, line)
                continue
            replica.url, replica.is_healthy = found[1], True
            if all(each.url for each in self.replicas):
                self.all_ready.set()
        return await life.wait()

    def _fail(self, replica: Replica) -> None:
        self.error = RequestError(
            f"replica {replica.index} did not start: {replica.last_error}",
            "start one alone, without `--replicas`, to see all that it says",
        )

    async def _look_at(self, replica: Replica) -> None:
        """Ask a replica again and again how it is."""
        while True:
            await asyncio.sleep(_LOOK_S)
            url = replica.url
            if url is None:
                continue
            try:
                response = await self._client.get(f"{url}/health", timeout=_ANSWER_S)
                is_healthy = response.status_code == 200
            except httpx.TransportError:
                is_healthy = False
            if replica.url == url:
                replica.is_healthy = is_healthy
