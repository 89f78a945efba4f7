"""Decode pools, as a prefill pool sees them."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenspeed_plan.runtime.pools.channel import Channel, ChannelClosed, Message
from tokenspeed_plan.runtime.pools.prefill_jobs import PrefillJob


@dataclass(slots=True, eq=False)
class Caller:
    """A decode pool that is connected; `is_open`: its caches can be written."""

    number: int
    channel: Channel
    is_open: bool = False
    jobs: dict[int, PrefillJob] = field(default_factory=dict)

    def tell(self, message: Message) -> None:
        """Send a message; one that does not take it is lost, and its reader notices."""
        try:
            self.channel.send(message)
        except ChannelClosed:
            self.channel.close()
