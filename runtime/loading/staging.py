"""From memory-mapped files to a GPU: through pinned memory in two halves, one filled while the other one is sent."""

from __future__ import annotations

import torch
from torch import Tensor

HALF_BYTES = 64 << 20


class Staging:
    """Copies into the tensors of a device; on a CPU, and into what is not contiguous, they are plain copies."""

    def __init__(self, device: str, half_bytes: int = HALF_BYTES) -> None:
        self._pinned = device == "cuda"
        self._halves = [
            torch.empty(half_bytes if self._pinned else 0, dtype=torch.uint8) for _ in range(2)
        ]
        if self._pinned:
            self._halves = [half.pin_memory() for half in self._halves]
            self._sent = [torch.cuda.Event() for _ in range(2)]
        self._turn = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        """The source's values, in the target's dtype; `source` may go once this returns, the target is there later."""
        if not self._pinned or not target.is_contiguous():
            target.copy_(source)
            return
        flat, values = target.view(-1), source.reshape(-1)
        step = self._halves[0].numel() // target.element_size()
        for start in range(0, flat.numel(), step):
            self._send(flat[start : start + step], values[start : start + step])

    def _send(self, target: Tensor, source: Tensor) -> None:
        self._turn = 1 - self._turn
        sent = self._sent[self._turn]
        sent.synchronize()
        half = self._halves[self._turn][: target.nbytes].view(target.dtype)
        half.copy_(source)
        target.copy_(half, non_blocking=True)
        sent.record()

    def finish(self) -> None:
        """Wait until all targets are there."""
        if self._pinned:
            torch.cuda.synchronize()
