"""A worker of a shared batch with the fake engine, in this process or in one of its own."""

from __future__ import annotations

import os
import signal
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from batch_fake import FakeEngine, FakeTokenizer, plan
from forks import FORKS
from fsspec.implementations.memory import MemoryFileSystem

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
    """A worker until its end, with a clock that is `clock_s` ahead; or until it checks rows."""
    if clock_s:
        real = time.time
        time.time = lambda: real() + clock_s
    if more.pop("dies", False):
        row_checks.LOOKED_INTO, row_checks.CHECK_ROWS = 4, 10
        lease_worker.check_shards = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    folder, source, output = paths
    code = 70
    try:
        code = worker(FolderStore(folder), source, output, engine=FakeEngine(step_ms), **more).run()
    finally:
        os._exit(code)


def started(folder: Path, source: Path, output: Path, **more: Any) -> BaseProcess:
    """A worker in a process of its own; each of its engine's steps takes `step_ms`."""
    step_ms, clock_s = more.pop("step_ms", 0.0), more.pop("clock_s", 0.0)
    paths = folder, source, output
    process = FORKS.Process(target=be_worker, args=(paths, step_ms, clock_s, more), daemon=True)
    process.start()
    return process
