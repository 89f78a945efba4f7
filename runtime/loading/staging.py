"""Copies from memory-mapped files to a GPU, through two halves of pinned host memory.

One half is filled while the other one is sent.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF_BYTES = 64 << 20


class Staging:
    """Copies into tensors of one device.

    On a CPU, and into tensors that are not contiguous, it copies directly.

    Args:
        device: `cuda` or `cpu`.
        half_bytes: pinned memory of each half.
    """

    def __init__(self, device: str, half_bytes: int = HALF_BYTES) -> None:
        self._halves: list[Tensor] = []
        self._sent: list[torch.cuda.Event] = []
        self._is_pinned = device == "cuda"
        self._turn = 0
        if self._is_pinned:
            for _ in range(2):
                half = torch.empty(half_bytes, dtype=torch.uint8)
                self._halves.append(half.pin_memory())
                self._sent.append(torch.cuda.Event())

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy the values of `source`, in the dtype of `target`.

        `source` may be freed after this call; `target` is complete only after `finish`.
        """
        if not self._is_pinned or not target.is_contiguous():
            target.copy_(source)
            return
        flat_target = target.view(-1)
        flat_source = source.reshape(-1)
        half_bytes = self._halves[0].numel()
        step = half_bytes // target.element_size()
        for start in range(0, flat_target.numel(), step):
            part = slice(start, start + step)
            self._send(flat_target[part], flat_source[part])

    def _send(self, target: Tensor, source: Tensor) -> None:
        """Fill the half that was sent first, then send it."""
        self._turn = 1 - self._turn
        sent = self._sent[self._turn]
        sent.synchronize()
        half = self._halves[self._turn]
        values = half[: target.nbytes].view(target.dtype)
        values.copy_(source)
        target.copy_(values, non_blocking=True)
        sent.record()

    def finish(self) -> None:
        """Wait until all targets are complete."""
        if self._is_pinned:
            torch.cuda.synchronize()
