"""The replicas as processes: started, watched, started again, and restarted one after the other."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import time
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import httpx

from tokenspeed_plan.plans.errors import RequestError

_LOG = logging.getLogger("tokenspeed_plan.router")
_READY = re.compile(r"ready at (http://\S+)/v1")
_LOOK_S = 0.5  # between two looks at a replica's health
_ANSWER_S = 5.0  # in which it must say how it is
_SHORT_LIFE_S = 10.0  # a replica that ends sooner is started again later each time
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
END_S = 15.0  # beyond its drain, in which a replica ends by itself
_SIGNAL_S = 0.3  # between two signals, which are one where they come together
_LONGEST_LINE = 1 << 20  # that a replica prints, in bytes
_KEPT_LINES = 50  # of what it has printed last


@dataclass(frozen=True, slots=True)
class Launch:
    """How replicas are started.

    Attributes:
        count: how many.
        command: of each; it says on stderr where it listens.
        environments: what each has beside the variables of this process.
        drain_s: what a replica leaves to its requests when it is told to end.
    """

    count: int
    command: Sequence[str]
    environments: Sequence[Mapping[str, str]]
    drain_s: float


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
    process: Process | None = None
    printed: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES))

    @property
    def is_up(self) -> bool:
        """Whether it takes requests."""
        return self.url is not None and self.is_healthy and not self.is_leaving

    @property
    def last_error(self) -> str:
        """The error that it printed last."""
        errors = [line for line in self.printed if line.startswith("error: ")]
        return errors[-1].removeprefix("error: ") if errors else "it said nothing"


class Fleet:
    """All replicas of this host.

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
                if replica.process is not None and replica.process.returncode is None:
                    with suppress(ProcessLookupError):
                        replica.process.terminate()
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
            await self._end(replica)
            while not (replica.url and replica.is_healthy) and not self._ending:
                await asyncio.sleep(_LOOK_S / 10)
        finally:
            replica.is_leaving = False

    async def _end(self, replica: Replica) -> None:
        process = replica.process
        if process is None or process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(self._launch.drain_s + END_S):
                await process.wait()
        except TimeoutError:
            _LOG.warning("replica %d does not end, and is killed", replica.index)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        replica.url = None

    async def _keep(self, replica: Replica) -> None:
        """Start a replica, and again whenever it ends."""
        pause_s = _FIRST_PAUSE_S
        while not self._ending:
            begun_s = time.monotonic()
            code = await self._live(replica)
            replica.url, replica.is_healthy = None, False
            self._lost(replica.index)
            if self._ending:
                return
            replica.restarts += 1
            if not self.all_ready.is_set() and not replica.is_leaving:
                self._fail(replica)
                return
            if replica.is_leaving:
                continue
            _LOG.warning("replica %d %s; it is started again", replica.index, _how_ended(code))
            if time.monotonic() - begun_s > _SHORT_LIFE_S:
                pause_s = _FIRST_PAUSE_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _live(self, replica: Replica) -> int:
        """The life of a process; returns its exit code."""
        environment = dict(os.environ) | dict(self._launch.environments[replica.index])
        replica.printed.clear()
        replica.process = process = await asyncio.create_subprocess_exec(
            *self._launch.command,
            env=environment,
            stdin=PIPE,
            stderr=PIPE,
            process_group=0,
            limit=_LONGEST_LINE,
        )
        assert process.stderr is not None
        async for raw in process.stderr:
            line = raw.decode(errors="replace").rstrip()
            found = _READY.search(line)
            if found is None:
                replica.printed.append(line)
                if line:
                    _LOG.warning("[replica %d] %s", replica.index, line)
                continue
            replica.url, replica.is_healthy = found[1], True
            if all(each.url for each in self.replicas):
                self.all_ready.set()
        return await process.wait()

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


def _how_ended(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"has ended with code {code}"
