"""Collective operations of the ranks of a plan: sums and concatenations over all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from tokenspeed_plan.runtime.execution.rank_loss import LOSS


class Collectives(Protocol):
    """The operations; every rank calls the same ones in the same order."""

    def all_reduce(self, source: Tensor, target: Tensor) -> None:
        """target = sum of source over the ranks."""

    def all_gather(self, source: Tensor, target: Tensor) -> None:
        """target = the columns of all ranks, side by side."""


class ProcessCollectives:
    """Collectives of processes on a CPU, by torch.distributed.

    Args:
        group: the ranks; a call has its deadline.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def all_reduce(self, source: Tensor, target: Tensor) -> None:
        """The sum, added up in the order of the ranks, so that all of them get the same bits."""
        parts = self._gather(source)
        target.copy_(parts.sum(0))

    def all_gather(self, source: Tensor, target: Tensor) -> None:
        """The columns of all ranks."""
        parts = self._gather(source)
        target.copy_(torch.cat(tuple(parts), -1))

    def _gather(self, source: Tensor) -> Tensor:
        """The sources of all ranks, [ranks, ...]."""
        parts = source.new_empty(self._group.size(), *source.shape)
        with translate_dist_errors():
            dist.all_gather(list(parts), source.contiguous(), group=self._group)
        return parts


@contextmanager
def translate_dist_errors() -> Iterator[None]:
    """Translate errors of torch.distributed.

    Raises:
        RankError: the call failed, or another rank did not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0]
        raise LOSS.error(f"the link to another rank broke: {reason}") from error
