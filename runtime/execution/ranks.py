"""Several processes that replay one plan.

Rank 0 schedules, and sends an order before each replay; the others replay the same program on the
same inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

from tokenspeed_plan.plans.errors import RankError
from tokenspeed_plan.plans.schema import Program
from tokenspeed_plan.runtime.execution.collectives import (
    order_group,
    replay_group,
    stop_heartbeat,
    translate_dist_errors,
)
from tokenspeed_plan.runtime.execution.executor import Executor
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory

# An order has three numbers: the index of a program, and the tokens and sequences of its batch; or
# one of these, and its two arguments.
STOP = -1
COPY_PAGE = -2


class Leader:
    """Rank 0: sends the others an order before everything it does."""

    def before_run(
        self, memory: PlanMemory, program: Program, num_tokens: int, num_seqs: int
    ) -> None:
        """Send the program and the size of the batch, then the inputs."""
        index = memory.plan.pool.programs.index(program)
        _send([index, num_tokens, num_seqs])
        _share_inputs(memory, program, num_tokens, num_seqs)

    def before_copy(self, source: int, target: int) -> None:
        """Send the numbers of both pages."""
        _send([COPY_PAGE, source, target])


class Follower:
    """The other ranks: `follow` receives the order, and the follower the inputs of a replay."""

    def before_run(
        self, memory: PlanMemory, program: Program, num_tokens: int, num_seqs: int
    ) -> None:
        """Receive the inputs."""
        _share_inputs(memory, program, num_tokens, num_seqs)

    def before_copy(self, source: int, target: int) -> None:
        """Nothing: the order has both pages."""


def follow(executor: Executor) -> None:
    """Carry out the orders of rank 0 until it stops; the executor's `lead` is a `Follower`."""
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
    """Stop the other ranks when rank 0 ends, in whatever way."""
    is_linked = True
    try:
        yield
    except RankError:
        is_linked = False  # the others find out by themselves; one of them may read nothing more
        raise
    finally:
        stop_heartbeat()
        if is_linked:
            with suppress(RankError):  # they may have ended already
                _send([STOP, 0, 0])


def meet() -> None:
    """Wait until all ranks are loaded: from here on, none waits long for another."""
    with translate_dist_errors():
        dist.all_reduce(torch.zeros(1), group=order_group())


def _share_inputs(memory: PlanMemory, program: Program, num_tokens: int, num_seqs: int) -> None:
    """Broadcast the input buffers of rank 0."""
    with translate_dist_errors():
        for name in program.inputs:
            dist.broadcast(memory.buffer(name, num_tokens, num_seqs), 0, group=replay_group())


def _send(order: list[int]) -> None:
    with translate_dist_errors():
        dist.broadcast(torch.tensor(order), 0, group=order_group())


def _receive() -> list[int]:
    order = torch.zeros(3, dtype=torch.int64)
    with translate_dist_errors():
        dist.broadcast(order, 0, group=order_group())
    return order.tolist()
