"""A digest of some of what was handed over, which both sides take of their own memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

# Of each buffer one page, and of each state the first bytes: little enough to copy to the host.
STATE_BYTES = 4096
_STRIDE = 7  # from the page of a buffer to that of the next: a prime, so that all have their turn


def sample_digest(
    pages: Sequence[Tensor],
    states: Sequence[Tensor],
    page_numbers: Sequence[int],
    state_slot: int,
) -> str:
    """The digest of one page of each buffer, and of the beginning of each state.

    Args:
        pages: the buffers of keys and values that both pools have, in the order of their names.
        states: those of recurrent state.
        page_numbers: of the pages that were handed over, in their order.
        state_slot: of the state that was; 0 where there is none.
    """
    parts = list(_sampled_pages(pages, page_numbers))
    if state_slot:
        parts += [_bytes(state[state_slot])[:STATE_BYTES] for state in states]
    digest = blake2b(digest_size=16)
    if parts:
        digest.update(torch.cat(parts).cpu().numpy().tobytes())
    return digest.hexdigest()


def _sampled_pages(pages: Iterable[Tensor], numbers: Sequence[int]) -> Iterable[Tensor]:
    if not numbers:
        return
    for index, buffer in enumerate(pages):
        yield _bytes(buffer[numbers[index * _STRIDE % len(numbers)]])


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
