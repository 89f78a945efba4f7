"""Collective operations of the ranks of a plan: sums and concatenations over all of them."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from tokenspeed_plan.plans.errors import PlanError, RankError
from tokenspeed_plan.plans.schema import Plan


class Collectives(Protocol):
    """The operations; every rank calls the same ones in the same order."""

    def all_reduce(self, source: Tensor, target: Tensor) -> None:
        """target = sum of source over the ranks."""

    def all_gather(self, source: Tensor, target: Tensor) -> None:
        """target = the columns of all ranks, side by side."""


class ProcessCollectives:
    """Collectives of processes, by torch.distributed."""

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
        parts = source.new_empty(dist.get_world_size(), *source.shape)
        with translate_dist_errors():
            dist.all_gather(list(parts), source.contiguous())
        return parts


@contextmanager
def translate_dist_errors() -> Iterator[None]:
    """Translate errors of torch.distributed, which has no error class of its own for a lost peer.

    Raises:
        RankError: the call failed.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0]
        hint = (
            "its own message says why it ended; start all ranks again, a batch goes on where it was"
        )
        raise RankError(f"the link to another rank broke: {reason}", hint) from error


def world_size() -> int:
    """Number of processes that were started together; torchrun sets it in the environment."""
    return _number("WORLD_SIZE", 1)


def own_rank() -> int:
    """The number of this process among them, from 0."""
    return _number("RANK", 0)


def _number(name: str, default: int) -> int:
    """A number from the environment."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise RankError(
            f"the environment has {name}={text}", "unset it, or start the ranks with torchrun"
        )
    return int(text)


def join(plan: Plan) -> tuple[int, Collectives | None]:
    """Join the other ranks of a plan.

    Returns:
        This process's rank, and the collectives; None where the plan has one rank.

    Raises:
        PlanError: there are not as many processes as the plan has ranks.
    """
    world = world_size()
    count = plan.target.count
    if world != count:
        command = f"torchrun --no-python --nproc-per-node {count} tokenspeed run ..."
        raise PlanError(
            f"the plan has {count} ranks, this is one of {world} processes",
            f"start them together: `{command}`",
        )
    if world == 1:
        return 0, None
    if not dist.is_initialized():
        # A server may wait long for its next request. A lost peer is noticed without a timeout.
        dist.init_process_group("gloo", timeout=timedelta(days=365))
        atexit.register(_leave)
    return dist.get_rank(), ProcessCollectives()


def _leave() -> None:
    """End gloo's threads; a process that ends before them is sometimes aborted."""
    if dist.is_initialized():
        dist.destroy_process_group()
