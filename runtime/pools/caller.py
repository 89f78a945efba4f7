"""Decode pools, as a prefill pool sees them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from tokenspeed_plan.runtime.pools.channel import ChannelClosed, Message
from tokenspeed_plan.runtime.pools.prefill_jobs import PrefillJob


class Line(Protocol):
    """By which a caller is told something."""

    def send(self, message: Message) -> None:
        """Send a message.

        Raises:
            ChannelClosed: the other side does not take it.
        """

    def close(self) -> None:
        """End the connection."""


@dataclass(slots=True, eq=False)
class Caller:
    """A decode pool that is connected; `is_open`: its caches can be written."""

    number: int
    channel: Line
    is_open: bool = False
    jobs: dict[int, PrefillJob] = field(default_factory=dict)

    def tell(self, message: Message) -> None:
        """Send a message; one that does not take it is lost, and its reader notices."""
        try:
            self.channel.send(message)
        except ChannelClosed:
            self.channel.close()
