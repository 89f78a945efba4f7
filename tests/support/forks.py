"""Processes forked from one that has loaded the product once, and has no threads.

A process that was forked from a test's own would keep the locks that threads of earlier tests held
at that moment, and wait for them without end.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "pytest",
        "hypothesis",
        "torch.distributed",
        "tokenspeed_plan.planner.cli",
        "tokenspeed_plan.planner.commands.run",
        "tokenspeed_plan.planner.commands.serve",
        "tokenspeed_plan.runtime.engine",
        "tokenspeed_plan.runtime.execution.ranks",
        "tokenspeed_plan.runtime.serving.batch",
        "tokenspeed_plan.runtime.serving.http",
        "tokenspeed_plan.runtime.serving.leases.lease_worker",
    ]
)


@dataclass(frozen=True)
class Done:
    """What a process said and how it ended, as `subprocess.run` tells it."""

    returncode: int | None
    stdout: str
    stderr: str


def run_forked(main: Callable[[list[str]], object], words: list[str]) -> Done:
    """A command in a process of its own, which has little to import; it may take a minute."""
    with TemporaryDirectory() as folder:
        streams = Path(folder, "stdout"), Path(folder, "stderr")
        process = FORKS.Process(target=_be_command, args=(main, words, streams), daemon=True)
        process.start()
        process.join(60)
        process.kill()
        process.join()
        return Done(process.exitcode, *(path.read_text(encoding="utf-8") for path in streams))


def _be_command(
    main: Callable[[list[str]], object], words: list[str], streams: tuple[Path, Path]
) -> None:
    gc.freeze()  # what was forked outlives it
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    main(words)
