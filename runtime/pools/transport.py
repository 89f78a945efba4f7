"""How bytes get from the memory of one pool into that of another: a push, never a pull.

Memory is registered once, at the start. Whoever receives describes its arenas, as JSON; whoever
sends opens that description, and writes. Nobody is asked while bytes move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tokenspeed_plan.runtime.pools.blocks import Copy


class Pending(Protocol):
    """A push under way."""

    def is_done(self) -> bool:
        """Whether all its bytes are there.

        Raises:
            PoolError: they will not get there.
        """


class Route(Protocol):
    """The memory of one peer, as this process writes it."""

    def push(self, parts: Sequence[Copy]) -> Pending:
        """Start to write; what is read must stay as it is until that is done.

        Raises:
            PoolError: the peer cannot be reached.
        """

    def close(self) -> None:
        """Wait for what is under way, and write nothing more."""


class Sending(Protocol):
    """What a pool has to know of a way to move bytes.

    Attributes:
        name: as the option `--transport` has it.
        settle_s: for how long bytes may still land here after the process that sent them ended.
    """

    name: str
    settle_s: float


class Transport(Sending, Protocol):
    """One way to move bytes."""

    def describe(self) -> dict[str, Any]:
        """What a peer has to know to write into this memory."""

    def reach(self, description: dict[str, Any]) -> Route:
        """The memory that a peer has described.

        Raises:
            PoolError: it cannot be reached from here.
        """
