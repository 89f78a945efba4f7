"""Collective operations of the ranks of a plan: sums and concatenations over all of them."""

from __future__ import annotations

import atexit
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from tokenspeed_plan.plans.errors import PlanError, RankError
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.execution.heartbeat import Heartbeat, link_error

DEFAULT_TIMEOUT_S = 30.0
_FOREVER = timedelta(days=365)
_START = timedelta(minutes=5)  # from the first rank's start to the last one's
_LOOPBACK = "127.0.0.1"


class Collectives(Protocol):
    """The operations; every rank calls the same ones in the same order."""

    def all_reduce(self, source: Tensor, target: Tensor) -> None:
        """target = sum of source over the ranks."""

    def all_gather(self, source: Tensor, target: Tensor) -> None:
        """target = the columns of all ranks, side by side."""


class ProcessCollectives:
    """Collectives of processes, by torch.distributed."""

    def all_reduce(self, source: Tensor, target: Tensor) -> None:
        """The sum, added up in the order of the ranks, so that all of them get the same bits."""
        parts = self._gather(source)
        target.copy_(parts.sum(0))

    def all_gather(self, source: Tensor, target: Tensor) -> None:
        """The columns of all ranks."""
        parts = self._gather(source)
        target.copy_(torch.cat(tuple(parts), -1))

    def _gather(self, source: Tensor) -> Tensor:
        """The sources of all ranks, [ranks, ...]."""
        parts = source.new_empty(dist.get_world_size(), *source.shape)
        with translate_dist_errors():
            dist.all_gather(list(parts), source.contiguous(), group=replay_group())
        return parts


@contextmanager
def translate_dist_errors() -> Iterator[None]:
    """Translate errors of torch.distributed.

    Raises:
        RankError: the call failed, or another rank did not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        raise link_error(error) from error


def world_size() -> int:
    """Number of processes that were started together; torchrun sets it in the environment.

    Raises:
        RankError: the environment is half set.
    """
    return _place()[1]


def own_rank() -> int:
    """The number of this process among them, from 0.

    Raises:
        RankError: the environment is half set.
    """
    return _place()[0]


def _place() -> tuple[int, int]:
    """The rank and the number of ranks."""
    world = _number("WORLD_SIZE", 1)
    rank = _number("RANK", 0)
    if "RANK" in os.environ and "WORLD_SIZE" not in os.environ:
        raise _half_set(f"RANK={rank} and no WORLD_SIZE")
    if world > 1 and "RANK" not in os.environ:
        raise _half_set(f"WORLD_SIZE={world} and no RANK")
    if rank >= world:
        raise _half_set(f"RANK={rank} and WORLD_SIZE={world}")
    return rank, world


def _number(name: str, default: int) -> int:
    """A number from the environment."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise _half_set(f"{name}={text:.80}")
    return int(text)


def _half_set(found: str) -> RankError:
    return RankError(f"the environment has {found}", "unset it, or start the ranks with torchrun")


def join(plan: Plan, timeout_s: float = DEFAULT_TIMEOUT_S) -> tuple[int, Collectives | None]:
    """Join the other ranks of a plan.

    Args:
        plan: says how many ranks there are.
        timeout_s: seconds that a rank waits for another one in a replay.

    Returns:
        This process's rank, and the collectives; None where the plan has one rank.

    Raises:
        PlanError: there are not as many processes as the plan has ranks.
        RankError: the environment does not say how to reach them.
    """
    world = world_size()
    count = plan.target.count
    if world != count:
        command = f"torchrun --no-python --nproc-per-node {count} tokenspeed run ..."
        raise PlanError(
            f"the plan has {count} ranks, this is one of {world} processes",
            f"start them together: `{command}`",
        )
    if world == 1:
        return 0, None
    if not dist.is_initialized():
        _link(own_rank(), world, timeout_s)
    return dist.get_rank(), ProcessCollectives()


@dataclass(slots=True)
class _Links:
    """The groups of this process and the other ranks; each has its own order of calls.

    Attributes:
        orders: rank 0 says what comes next; no deadline, as a server may wait long for a request.
        replays: inputs and collectives, with a deadline.
    """

    orders: dist.ProcessGroup | None = None
    replays: dist.ProcessGroup | None = None
    heartbeat: Heartbeat | None = None


_links = _Links()


def order_group() -> dist.ProcessGroup | None:
    """The group in which rank 0 says what comes next."""
    return _links.orders


def replay_group() -> dist.ProcessGroup | None:
    """The group that replays a program."""
    return _links.replays


def silent_s() -> float:
    """Seconds since all ranks were heard last; 0 where there is one rank."""
    if _links.heartbeat is None:
        return 0.0
    return _links.heartbeat.silent_s


def stop_heartbeat() -> None:
    """Tell the other ranks that this one is about to end."""
    if _links.heartbeat:
        _links.heartbeat.stop()


def _link(rank: int, world: int, timeout_s: float) -> None:
    """Make the groups of the ranks, and begin to watch them."""
    deadline = timedelta(seconds=timeout_s)
    with translate_dist_errors():
        dist.init_process_group(
            "gloo", store=_store(rank, world), rank=rank, world_size=world, timeout=_START
        )
        atexit.register(_leave)
        _links.orders = dist.new_group(backend="gloo", timeout=_FOREVER)
        _links.replays = dist.new_group(backend="gloo", timeout=deadline)
        _links.heartbeat = Heartbeat(dist.new_group(backend="gloo", timeout=deadline))


def _store(rank: int, world: int) -> PrefixStore:
    """Where the ranks find each other. It listens on the address of rank 0, and on no other.

    Raises:
        RankError: the environment does not say where, or the address is not rank 0's.
    """
    if "MASTER_PORT" not in os.environ:
        raise _half_set(f"WORLD_SIZE={world} and no MASTER_PORT")
    host, port = os.environ.get("MASTER_ADDR", _LOOPBACK), _number("MASTER_PORT", 0)
    if not 0 < port < 1 << 16:
        raise _half_set(f"MASTER_PORT={port}")
    if host in ("localhost", "::1") or host.startswith("127."):
        # gloo would listen on the address of the machine's name.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    if rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        found = TCPStore(host, port, is_master=False)
    else:
        descriptor = _listen(host, port)
        found = TCPStore(
            host, port, is_master=True, master_listen_fd=descriptor, wait_for_workers=False
        )
    return PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), found)


def _listen(host: str, port: int) -> int:
    """The descriptor of a socket that listens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        raise RankError(
            f"rank 0 cannot listen on {host:.80}:{port}: {error}",
            "set MASTER_ADDR to an address of its machine and MASTER_PORT to a free port",
        ) from error
    return listener.detach()


def _leave() -> None:
    """End gloo's threads; a process that ends before them is sometimes aborted."""
    stop_heartbeat()
    if dist.is_initialized():
        dist.destroy_process_group()
