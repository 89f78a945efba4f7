"""A worker of a shared batch with the fake engine, in this process or in one of its own."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from batch_fake import FakeEngine, FakeTokenizer, plan
from forks import FORKS
from fsspec.implementations.memory import MemoryFileSystem

from tokenspeed_plan.runtime.request import Completion
from tokenspeed_plan.runtime.serving.leases import lease_worker, row_checks
from tokenspeed_plan.runtime.serving.leases.job_input import JobInput
from tokenspeed_plan.runtime.serving.leases.job_store import FolderStore, ObjectStore, Store
from tokenspeed_plan.runtime.serving.leases.lease_worker import Worker, WorkerOptions


class Bucket(MemoryFileSystem):
    """An object store: what is made only where there is nothing is made once."""

    cachable = False
    _lock = threading.Lock()

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **more: Any) -> None:
        with self._lock:
            super().pipe_file(path, value, mode, **more)


class BorderEngine(FakeEngine):
    """Says once when it has rows of two shards; counts what runs at each step.

    Args:
        num_rows: of a shard; row 17 has the prompt `row 17`.
        at_border: is told the shards, the older one first.
        step_ms: of each step.

    Attributes:
        counts: before each step: requests that run, and requests that were ever begun.
    """

    def __init__(
        self,
        num_rows: int,
        at_border: Callable[[list[int]], object] = lambda shards: None,
        step_ms: float = 0.0,
    ) -> None:
        super().__init__(step_ms)
        self.counts: list[tuple[int, int]] = []
        self._num_rows = num_rows
        self._at_border: Callable[[list[int]], object] | None = at_border

    @property
    def shards(self) -> list[int]:
        """The shards of the rows that run."""
        prompts = [bytes(request.prompt_ids).decode() for request, _ in self.requests.values()]
        numbers = [int(prompt.removeprefix("row ")) // self._num_rows for prompt in prompts]
        return [*dict.fromkeys(numbers)]

    def step(self) -> list[Completion]:
        self.counts.append((len(self.requests), len(self.seen)))
        if self._at_border is not None and len(self.shards) == 2:
            at_border, self._at_border = self._at_border, None
            at_border(self.shards)
        return super().step()


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def bucket(name: str) -> ObjectStore:
    return ObjectStore(Bucket(), f"/{name}")


def worker(
    store: Store,
    source: Path,
    output: Path,
    shards: int = 4,
    engine: FakeEngine | None = None,
    digest: str = "d",
    timeout_s: float = 0.5,
    **job: Any,
) -> Worker:
    made = engine or FakeEngine()
    rows = JobInput(str(source), shards, **job)
    options = WorkerOptions(rows, str(output), timeout_s, quiet=True)
    return Worker(store, options, plan(digest), FakeTokenizer(), lambda: made)


def be_worker(paths: tuple[Path, Path, Path], step_ms: float, clock_s: float, more: Any) -> None:
    """A worker until its end, with a clock that is `clock_s` ahead.

    It is killed when it checks rows, or when it has rows of two shards, where it is so said.
    """
    gc.freeze()
    if clock_s:
        real = time.time
        time.time = lambda: real() + clock_s
    if more.pop("dies", False):
        row_checks.LOOKED_INTO, row_checks.CHECK_ROWS = 4, 10
        lease_worker.check_shards = die
    num_rows = more.pop("dies_at_border_of", 0)
    engine = BorderEngine(num_rows, die, step_ms) if num_rows else FakeEngine(step_ms)
    folder, source, output = paths
    code = 70
    try:
        code = worker(FolderStore(folder), source, output, engine=engine, **more).run()
    finally:
        os._exit(code)


def started(folder: Path, source: Path, output: Path, **more: Any) -> BaseProcess:
    """A worker in a process of its own; each of its engine's steps takes `step_ms`."""
    step_ms, clock_s = more.pop("step_ms", 0.0), more.pop("clock_s", 0.0)
    paths = folder, source, output
    process = FORKS.Process(target=be_worker, args=(paths, step_ms, clock_s, more), daemon=True)
    process.start()
    return process
