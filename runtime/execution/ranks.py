"""Several processes, one plan: rank 0 schedules, the others repeat each replay on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

from tokenspeed_plan.plans.errors import RankError
from tokenspeed_plan.plans.schema import Program
from tokenspeed_plan.runtime.execution.collectives import translate_dist_errors
from tokenspeed_plan.runtime.execution.executor import Executor
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory

# An order has three numbers: the index of a program and the size of its batch, or one of these
# and its two arguments.
STOP, COPY_PAGE = -1, -2


class Leader:
    """Rank 0: tells the others what it is about to do."""

    def before_run(
        self, memory: PlanMemory, program: Program, num_tokens: int, num_seqs: int
    ) -> None:
        """Name the program, then send its inputs."""
        _send([memory.plan.pool.programs.index(program), num_tokens, num_seqs])
        _share_inputs(memory, program, num_tokens, num_seqs)

    def before_copy(self, source: int, target: int) -> None:
        """Name both pages."""
        _send([COPY_PAGE, source, target])


class Follower:
    """The other ranks: `follow` receives the order, and this the inputs of a replay."""

    def before_run(
        self, memory: PlanMemory, program: Program, num_tokens: int, num_seqs: int
    ) -> None:
        """Receive the inputs."""
        _share_inputs(memory, program, num_tokens, num_seqs)

    def before_copy(self, source: int, target: int) -> None:
        """The order named both pages."""


def follow(executor: Executor) -> None:
    """Ranks other than 0: do what rank 0 says, until it stops. Its `lead` is a `Follower`."""
    while True:
        index, first, second = _receive()
        if index == STOP:
            return
        if index == COPY_PAGE:
            executor.copy_page(first, second)
        else:
            executor.run(executor.plan.pool.programs[index], first, second)


@contextmanager
def leading() -> Iterator[None]:
    """However rank 0 ends, the others do not wait for it."""
    try:
        yield
    finally:
        with suppress(RankError):  # they have ended already
            _send([STOP, 0, 0])


def _share_inputs(memory: PlanMemory, program: Program, num_tokens: int, num_seqs: int) -> None:
    with translate_dist_errors():
        for name in program.inputs:
            dist.broadcast(memory.buffer(name, num_tokens, num_seqs), 0)


def _send(order: list[int]) -> None:
    with translate_dist_errors():
        dist.broadcast(torch.tensor(order), 0)


def _receive() -> list[int]:
    order = torch.zeros(3, dtype=torch.int64)
    with translate_dist_errors():
        dist.broadcast(order, 0)
    return order.tolist()
