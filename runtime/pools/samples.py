"""A digest of some of what was handed over, which both sides take of their own memory.

On a GPU it is read on a stream of its own, beside the steps that run meanwhile: nobody waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from hashlib import blake2b

import torch
from torch import Tensor

from tokenspeed_plan.runtime.execution.host_copy import HostCopy

# Of each buffer one page, and of each state the first bytes: little enough to copy to the host.
STATE_BYTES = 4096
_STRIDE = 7  # from the page of a buffer to that of the next: a prime, so that all have their turn


class Sampler:
    """Samples of the caches that two pools have in common.

    Args:
        pages: the buffers of keys and values, in the order of their names.
        states: those of recurrent state.
    """

    def __init__(self, pages: Sequence[Tensor], states: Sequence[Tensor]) -> None:
        self._pages = pages
        self._states = states
        self._stream: torch.cuda.Stream | None = None
        if any(buffer.is_cuda for buffer in (*pages, *states)):
            self._stream = torch.cuda.Stream()

    def take(self, page_numbers: Sequence[int], state_slot: int) -> Sample:
        """Read one page of each buffer, and the beginning of each state.

        Args:
            page_numbers: of the pages that were handed over, in their order.
            state_slot: of the state that was; 0 where there is none.
        """
        on_stream = torch.cuda.stream(self._stream) if self._stream else nullcontext()
        with on_stream:
            parts = list(self._parts(page_numbers, state_slot))
            return Sample(HostCopy(torch.cat(parts)) if parts else HostCopy())

    def _parts(self, numbers: Sequence[int], state_slot: int) -> Iterator[Tensor]:
        if numbers:
            for index, buffer in enumerate(self._pages):
                yield _bytes(buffer[numbers[index * _STRIDE % len(numbers)]])
        if state_slot:
            for state in self._states:
                yield _bytes(state[state_slot])[:STATE_BYTES]


class Sample:
    """Bytes on their way to the host."""

    def __init__(self, copy: HostCopy) -> None:
        self._copy = copy

    @property
    def is_ready(self) -> bool:
        """Whether they are there."""
        return self._copy.is_done

    def digest(self) -> str:
        """Their digest."""
        digest = blake2b(digest_size=16)
        for part in self._copy.wait():
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
