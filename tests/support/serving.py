"""A server in a process of its own, on a free port, with its log and its metrics."""

from __future__ import annotations

import gc
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
import torch
from forks import FORKS
from server_load import IN_USE

from tokenspeed_plan.planner.cli import main

KEY = "sk-of-the-tests"
Main = Callable[..., None]


def be_command(args: Sequence[str], log: Path, num_files: int | None = None) -> None:
    if num_files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (num_files, num_files))
    gc.freeze()
    torch.set_num_threads(1)
    os.environ.pop("TOKENSPEED_API_KEY", None)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main(list(args))


class Server:
    """`tokenspeed serve` on a bundle."""

    def __init__(
        self, bundle: Path, log: Path, *options: object, main: Main = be_command, **more: Any
    ) -> None:
        args = ["serve", bundle, "--port", 0, "--no-canary", *options]
        self.log = log
        self.process: BaseProcess = FORKS.Process(
            target=main, args=([*map(str, args)], log), kwargs=more, daemon=True
        )
        self.process.start()
        self.url = self._ready()
        self.http = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30
        )

    def _ready(self, seconds: float = 60) -> str:
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.is_alive():
            if found := re.search(r"ready at (http://\S+)/v1", self.text()):
                return found[1]
            time.sleep(0.02)
        raise AssertionError(f"the server does not come up: {self.text()}")

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def metric(self, name: str) -> float:
        """One number; all with its labels added up."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(
            float(line.split()[-1]) for line in lines if re.match(rf"tokenspeed_{name}[ {{]", line)
        )

    def in_use(self) -> dict[str, float]:
        return {name: self.metric(name) for name in IN_USE}

    def wait_until_idle(self, seconds: float = 10) -> dict[str, float]:
        """Wait until nothing is in use; returns what still is when the time is over."""
        until = time.monotonic() + seconds
        while any((used := self.in_use()).values()) and time.monotonic() < until:
            time.sleep(0.02)
        return used

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        assert self.process.pid
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = 30) -> int | None:
        """Its exit code."""
        self.process.join(seconds)
        return self.process.exitcode


@contextmanager
def serving(bundle: Path, folder: Path, *options: object, **more: Any) -> Iterator[Server]:
    """A running server; `main` is what its process does, and gets what else is named."""
    server = Server(bundle, folder / "server.log", *options, **more)
    try:
        yield server
    finally:
        server.http.close()
        server.process.kill()
        server.process.join()


@contextmanager
def good_server(bundle: Path, folder: Path, *options: object) -> Iterator[Server]:
    """A server with a key. At its end nothing is in use, no request got a 5xx, the log is empty."""
    with serving(bundle, folder, "--api-key", KEY, *options) as server:
        yield server
        assert not any(server.wait_until_idle().values())
        assert 'status="5' not in server.http.get("/metrics").text
        server.signal()
        assert server.wait() == 0
        assert server.text().count("\n") == 1, server.text()
