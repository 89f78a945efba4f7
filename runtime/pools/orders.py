"""Orders of prompts, and when they are posted."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.pools.channel import packed
from tokenspeed_plan.runtime.pools.peers import Handover, Peer
from tokenspeed_plan.runtime.scheduling.reservations import Reservation


def launched(is_on_gpu: bool) -> torch.cuda.Event | None:
    """An event after everything that was launched so far; a CPU has nothing on its way."""
    if not is_on_gpu:
        return None
    event = torch.cuda.Event()
    event.record()
    return event


class Orders:
    """Writes orders, and posts each once nothing that was launched before writes its memory.

    A step in flight may still write pages of a sequence that has ended meanwhile, and that are
    given to an order now.

    Args:
        plan: of the pool that orders.
    """

    def __init__(self, plan: Plan) -> None:
        self._page_size = plan.pool.limits.page_size
        self._is_on_gpu = plan.target.device == "cuda"

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
        handover.after = launched(self._is_on_gpu)

    def post(self, peers: Iterable[Peer]) -> None:
        """Post what can be posted."""
        for peer in peers:
            for handover in peer.jobs.values():
                is_clear = handover.after is None or handover.after.query()
                if handover.message is not None and is_clear:
                    peer.post(handover.message)
                    handover.message = None
