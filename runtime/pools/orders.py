"""Orders of prompts, and when they are posted."""

from __future__ import annotations

from collections.abc import Iterable

from tokenspeed_plan.runtime.pools.channel import packed
from tokenspeed_plan.runtime.pools.peers import Handover, Peer
from tokenspeed_plan.runtime.pools.pool_ranks import Ranks
from tokenspeed_plan.runtime.scheduling.reservations import Reservation


class Orders:
    """Writes orders, and posts each once nothing that was launched before writes its memory.

    A step in flight may still write pages of a sequence that has ended meanwhile, and that are
    given to an order now.

    Args:
        page_size: of the pool that orders.
        ranks: of that pool.
    """

    def __init__(self, page_size: int, ranks: Ranks) -> None:
        self._page_size = page_size
        self._ranks = ranks

    def write(self, handover: Handover, reservation: Reservation) -> None:
        """Write the order of a hand-over, whose memory was just taken."""
        handover.num_known = reservation.num_known * self._page_size
        handover.message = {
            "type": "prefill",
            "id": handover.order,
            "token_ids": packed(handover.sequence.token_ids[: reservation.num_tokens]),
            "first_page": reservation.num_known,
            "pages": reservation.new_pages,
            "slot": reservation.state_slot,
        }
        handover.after = self._ranks.launched()

    def post(self, peers: Iterable[Peer]) -> None:
        """Post what can be posted."""
        for peer in peers:
            for handover in peer.jobs.values():
                is_clear = handover.after is None or handover.after.query()
                if handover.message is not None and is_clear:
                    peer.post(handover.message)
                    handover.message = None
