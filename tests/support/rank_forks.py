"""Ranks as torchrun starts them, but forked from one process that has loaded everything."""

from __future__ import annotations

import gc
import os
import socket
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from forks import FORKS

from tokenspeed_plan.planner.cli import main

LOOPBACK = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def be_rank(rank: int, world: int, port: int, args: Sequence[str], log: Path) -> None:
    """The command as torchrun starts it, with its output in a file."""
    os.environ |= LOOPBACK | {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": str(port)}
    gc.freeze()
    torch.set_num_threads(1)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main(list(args))


def start(
    count: int, args: Sequence[object], folder: Path, target: Callable[..., None] = be_rank
) -> list[BaseProcess]:
    port, words = free_port(), [str(arg) for arg in args]
    ranks: list[BaseProcess] = [
        FORKS.Process(
            target=target, args=(rank, count, port, words, folder / f"{rank}.log"), daemon=True
        )
        for rank in range(count)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def wait(ranks: Sequence[BaseProcess], seconds: float = 120) -> list[int | None]:
    """Exit codes; None for a process that did not end in time."""
    until = time.monotonic() + seconds
    for rank in ranks:
        rank.join(max(until - time.monotonic(), 0))
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    return codes


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def logs(folder: Path, count: int) -> str:
    return "".join((folder / f"{rank}.log").read_text() for rank in range(count))


def batch(bundle: Path, folder: Path, *options: object) -> list[object]:
    """Arguments that answer `in.jsonl` of a folder."""
    return [
        "run",
        bundle,
        "--input",
        folder / "in.jsonl",
        "--output",
        folder / "out.jsonl",
        "--quiet",
        *options,
    ]
