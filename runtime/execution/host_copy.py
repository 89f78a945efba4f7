"""Copies between host and device that nobody waits for before their values are read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class HostCopy:
    """Tensors on their way to the host, in the order of the stream.

    Args:
        tensors: what to copy; they may be overwritten by what is launched later.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = [_copied(tensor) for tensor in tensors]
        if tensors and tensors[0].is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def is_done(self) -> bool:
        """Whether nobody has to wait for them."""
        return self._event is None or self._event.query()

    def wait(self) -> list[Tensor]:
        """The tensors on the host; waits for these copies alone."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


def _copied(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)


def index_on(device: torch.device, rows: Sequence[int]) -> Tensor:
    """Row numbers on a device, i64; the host does not wait until they are there."""
    host = torch.tensor(rows, dtype=torch.int64)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
