"""What joins the ranks of a plan: sums and concatenations over all of them."""

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
    """Every rank calls the same ones in the same order."""

    def all_reduce(self, source: Tensor, target: Tensor) -> None:
        """target = sum of source over the ranks."""

    def all_gather(self, source: Tensor, target: Tensor) -> None:
        """target = the columns of all ranks side by side."""


class ProcessCollectives:
    """Ranks that are processes of torch.distributed."""

    def all_reduce(self, source: Tensor, target: Tensor) -> None:
        """The sum, taken in the order of the ranks so that all of them get the same bits."""
        parts = self._gather(source)
        target.copy_(parts.sum(0))

    def all_gather(self, source: Tensor, target: Tensor) -> None:
        """The columns of all ranks."""
        target.copy_(torch.cat(tuple(self._gather(source)), -1))

    def _gather(self, source: Tensor) -> Tensor:
        parts = source.new_empty(dist.get_world_size(), *source.shape)
        with translate_dist_errors():
            dist.all_gather(list(parts), source.contiguous())
        return parts


@contextmanager
def translate_dist_errors() -> Iterator[None]:
    """For calls of torch.distributed: gloo has no class of its own for a lost peer.

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
    """Processes that were started together (torchrun says it in the environment)."""
    return _number("WORLD_SIZE", 1)


def own_rank() -> int:
    """Which of them this one is."""
    return _number("RANK", 0)


def _number(name: str, usual: int) -> int:
    text = os.environ.get(name, str(usual))
    if not text.isdecimal():
        raise RankError(
            f"the environment has {name}={text}", "unset it, or start the ranks with torchrun"
        )
    return int(text)


def join(plan: Plan) -> tuple[int, Collectives | None]:
    """This process's rank, and what joins it with the others; a plan of one rank needs nobody.

    Raises:
        PlanError: not as many processes as the plan has ranks.
    """
    world = world_size()
    if world != plan.target.count:
        raise PlanError(
            f"the plan has {plan.target.count} ranks, this is one of {world} processes",
            f"start them together: `torchrun --no-python --nproc-per-node {plan.target.count} tokenspeed run ...`",
        )
    if world == 1:
        return 0, None
    if not dist.is_initialized():
        # A server may wait for its next request for long; a lost peer is seen without a timeout.
        dist.init_process_group("gloo", timeout=timedelta(days=365))
        atexit.register(_leave)
    return dist.get_rank(), ProcessCollectives()


def _leave() -> None:
    """End gloo's threads: a process that ends before they do is aborted now and then."""
    if dist.is_initialized():
        dist.destroy_process_group()
