"""Which rank this process is, and where the ranks meet: what the environment says.

`tokenspeed` sets it for the ranks that it starts, as torchrun does for its own.
"""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from tokenspeed_plan.plans.errors import RankError

_LOOPBACK = "127.0.0.1"


@dataclass(slots=True)
class _Meeting:
    """`listener`: where rank 0 listens already."""

    listener: socket.socket | None = None


_meeting = _Meeting()


def world_size() -> int:
    """Number of processes that were started together.

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


def local_rank() -> int:
    """The number of this process among those of its machine.

    Raises:
        RankError: the environment is half set.
    """
    return _number("LOCAL_RANK", own_rank())


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
    return RankError(
        f"the environment has {found}",
        "unset it, as `tokenspeed` starts the ranks itself, or start them with torchrun",
    )


def meet_at(listener: socket.socket) -> None:
    """Tell rank 0 that it listens already where the others will look for it."""
    _meeting.listener = listener


def find_store(rank: int, world: int) -> PrefixStore:
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
    if _meeting.listener is not None:
        descriptor = os.dup(_meeting.listener.fileno())
        _meeting.listener = None
        return descriptor
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        raise RankError(
            f"rank 0 cannot listen on {host:.80}:{port}: {error}",
            "set MASTER_ADDR to an address of its machine and MASTER_PORT to a free port",
        ) from error
    return listener.detach()
