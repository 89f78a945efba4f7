"""`tokenspeed serve --ray`: replicas on the nodes of a cluster, behind the router of this process.

An actor has the GPUs of one replica, runs `tokenspeed serve` on its node, and passes on what that
says. To the router it is a process as any other: it listens, is asked for its health, and ends. So
routing, drain, rolling restarts and lost replicas are those of one host. A replica that is lost
with its node is started on another one.
"""

# Ray is of an extra that not every checkout has.
# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import os
import queue
import secrets
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenspeed_plan.planner.commands.engines import EngineOptions
from tokenspeed_plan.planner.commands.rank_processes import child_environment, own_command
from tokenspeed_plan.planner.commands.ray_actor import SentPlan, unpack
from tokenspeed_plan.planner.commands.ray_cluster import (
    Resources,
    cluster,
    no_room,
    pack,
    place_for,
    resources_of,
    room_for,
    start_at,
    words_given,
)
from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.schema import Plan

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.serving.http import ServerOptions
    from tokenspeed_plan.runtime.serving.router import Launch, Life

_WAIT_S = 1.0  # for which an actor waits for something to tell
_CALLS = 4  # of an actor at once: one waits, others bring signals
_KEY = "TOKENSPEED_API_KEY"
# Of the router, or said anew to each replica.
_OF_THE_ROUTER = ("bundle", "host", "port", "replicas", "ray", "api_key", "weights")


class ReplicaActor:
    """The actor: a server on its node."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._said: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._code = 0

    def start(self, sent: SentPlan, args: Sequence[str], environment: dict[str, str]) -> None:
        """Start the server; it listens where the other nodes reach this one."""
        import ray

        host = ray.util.get_node_ip_address()
        words = [*args, "--host", host, "--port", "0"]
        threading.Thread(target=self._run, args=(sent, words, environment), daemon=True).start()

    def lines(self) -> tuple[list[str], int | None]:
        """What it has said since it was asked last; once it has ended, its exit code."""
        found: list[str] = []
        with suppress(queue.Empty):
            line = self._said.get(timeout=_WAIT_S)
            while line is not None:
                found.append(line)
                line = self._said.get_nowait()
            return found, self._code
        return found, None

    def signal(self, number: int) -> None:
        """Send it a signal."""
        if self._process is not None:
            self._process.send_signal(number)

    def _run(self, sent: SentPlan, words: Sequence[str], environment: dict[str, str]) -> None:
        """The server's life: it ends with the thread that has started it."""
        try:
            command = own_command(["serve", str(unpack(sent)), *words])
        except (PlanError, OSError) as error:
            self._code = 2
            self._said.put(f"error: {str(error).splitlines()[0].removeprefix('error: ')}")
            self._said.put(None)
            return
        with subprocess.Popen(
            command,
            env=os.environ | child_environment() | environment,
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            self._process = process
            assert process.stderr is not None
            for raw in process.stderr:
                self._said.put(raw.decode(errors="replace").rstrip())
            self._code = process.wait()
        self._said.put(None)


class RayLife:
    """A replica at a place of the cluster, from its start to its end."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._said: asyncio.Queue[str | None] = asyncio.Queue()
        self._end = asyncio.get_running_loop().create_task(self._follow())

    @property
    def has_ended(self) -> bool:
        """Whether it is known to have ended."""
        return self._end.done()

    async def lines(self) -> AsyncIterator[str]:
        """What it says on stderr, until it ends."""
        while (line := await self._said.get()) is not None:
            yield line

    async def wait(self) -> str:
        """Wait for its end; says how it has ended."""
        return await asyncio.shield(self._end)

    def terminate(self) -> None:
        """Tell it to end."""
        self._actor.signal.remote(int(signal.SIGTERM))

    def kill(self) -> None:
        """End it now."""
        import ray

        ray.kill(self._actor)

    async def _follow(self) -> str:
        """Pass on what it says; in the end, free its place."""
        from ray.exceptions import RayError

        from tokenspeed_plan.runtime.serving.router import how_ended

        code, how = None, ""
        try:
            while code is None:
                lines, code = await self._actor.lines.remote()
                for line in lines:
                    self._said.put_nowait(line)
            how = how_ended(code)
        except RayError:
            how = "was lost with its node"
        self.kill()
        self._said.put_nowait(None)
        return how


@contextmanager
def launched_on_ray(
    bundle: Path,
    frozen: Plan,
    engine: EngineOptions,
    server: ServerOptions,
    address: str,
    count: int,
) -> Iterator[Launch]:
    """How the replicas of a plan are started on a cluster.

    Raises:
        RequestError: Ray is missing, or has no room for them.
    """
    import ray

    from tokenspeed_plan.runtime.loading.preflight import find_weights
    from tokenspeed_plan.runtime.serving.router import Launch

    weights = find_weights(frozen, bundle, engine.weights).resolve()
    args = [*words_given(but=_OF_THE_ROUTER), "--weights", str(weights)]
    # Others may reach a node, so replicas want a key where the router's clients need none.
    key = server.api_key or secrets.token_urlsafe(32)
    with cluster(address):
        resources = resources_of(frozen)
        if room_for(resources) < count:
            raise no_room(frozen, resources, room_for(resources))
        sent = ray.put(pack(bundle, frozen))
        places = [place_for(resources) for _ in range(count)]

        async def start(index: int) -> Life:
            return _started(places[index], resources, sent, args, {_KEY: key})

        yield Launch(count, start, server.drain_s, key)


def _started(
    place: Any, resources: Resources, sent: Any, args: Sequence[str], environment: dict[str, str]
) -> RayLife:
    actor = start_at(place, resources, ReplicaActor, max_concurrency=_CALLS)
    actor.start.remote(sent, list(args), environment)
    return RayLife(actor)
