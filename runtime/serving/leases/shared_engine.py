"""One engine for the rows of several shards: each gets what the engine has finished of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tokenspeed_plan.runtime.request import Completion, Request
from tokenspeed_plan.runtime.serving.batch.options import BatchEngine


class CancellingEngine(BatchEngine, Protocol):
    """An engine that can drop requests."""

    def cancel(self, request_id: str) -> bool:
        """Drop a request that waits or runs."""


class SharedEngine:
    """An engine that is loaded when the first row needs it.

    Args:
        load: called once.
        most: requests in the engine at once.
    """

    def __init__(self, load: Callable[[], CancellingEngine], most: int) -> None:
        self._load = load
        self._most = most
        self._engine: CancellingEngine | None = None
        self._shares: dict[str, EngineShare] = {}  # by request

    @property
    def has_room(self) -> bool:
        """Whether it would take another request."""
        return self._engine is None or self._engine.num_unfinished < self._most

    def ready(self) -> CancellingEngine:
        """The engine, loaded."""
        if self._engine is None:
            self._engine = self._load()
        return self._engine

    def add(self, request: Request, share: EngineShare) -> None:
        """Queue a request of a share."""
        self.ready().add(request)
        self._shares[request.request_id] = share

    def step(self) -> None:
        """Run one step, where there is something to do, for all shares."""
        if self._shares:
            for completion in self.ready().step():
                self._shares.pop(completion.request_id).finished.append(completion)

    def drop(self, share: EngineShare) -> None:
        """Cancel the requests of a share that are not finished."""
        names = [name for name, each in self._shares.items() if each is share]
        for name in names:
            self.ready().cancel(name)
            del self._shares[name]


class EngineShare:
    """The engine as one shard sees it.

    Attributes:
        startup_s: of the engine, once it is loaded.
        finished: requests of its own that it has not taken yet.
    """

    def __init__(self, shared: SharedEngine) -> None:
        self.startup_s: dict[str, float] = {}
        self.finished: list[Completion] = []
        self._shared = shared

    def load(self) -> BatchEngine:
        """It, with its engine loaded."""
        self.startup_s = self._shared.ready().startup_s
        return self

    @property
    def num_unfinished(self) -> int:
        """Requests of all shards that wait or run."""
        return self._shared.ready().num_unfinished

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._shared.add(request, self)

    def step(self) -> list[Completion]:
        """What the steps that were run for all shards have finished of this one."""
        finished, self.finished = self.finished, []
        return finished

    def close(self) -> None:
        """Drop what is not finished."""
        self._shared.drop(self)
