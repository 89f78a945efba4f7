"""Several processes, one plan: rank 0 schedules, the others repeat each replay on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

from tokenspeed_plan.plans.errors import RankError
from tokenspeed_plan.plans.schema import Program
from tokenspeed_plan.runtime.collectives import translate_dist_errors
from tokenspeed_plan.runtime.executor import Executor

STOP, COPY_PAGE = -1, -2


class LeadingExecutor(Executor):
    """Rank 0: tells the others what to replay, then replays it too."""

    def run(self, program: Program, num_tokens: int, num_seqs: int) -> None:
        """One replay on all ranks."""
        _send([self.plan.pool.programs.index(program), num_tokens, num_seqs])
        _share_inputs(self, program, num_tokens, num_seqs)
        super().run(program, num_tokens, num_seqs)

    def copy_page(self, source: int, target: int) -> int:
        """One copy on all ranks."""
        _send([COPY_PAGE, source, target])
        return super().copy_page(source, target)


def follow(executor: Executor) -> None:
    """Ranks other than 0: replay what rank 0 says, until it stops."""
    while (order := _receive())[0] != STOP:
        index, num_tokens, num_seqs = order
        if index == COPY_PAGE:
            executor.copy_page(num_tokens, num_seqs)
            continue
        program = executor.plan.pool.programs[index]
        _share_inputs(executor, program, num_tokens, num_seqs)
        executor.run(program, num_tokens, num_seqs)


@contextmanager
def leading() -> Iterator[None]:
    """However rank 0 ends, the others do not wait for it."""
    try:
        yield
    finally:
        with suppress(RankError):  # they have ended already
            _send([STOP, 0, 0])


def _share_inputs(executor: Executor, program: Program, num_tokens: int, num_seqs: int) -> None:
    with translate_dist_errors():
        for name in program.inputs:
            dist.broadcast(executor.buffer(name, num_tokens, num_seqs), 0)


def _send(order: list[int]) -> None:
    with translate_dist_errors():
        dist.broadcast(torch.tensor(order), 0)


def _receive() -> list[int]:
    order = torch.zeros(3, dtype=torch.int64)
    with translate_dist_errors():
        dist.broadcast(order, 0)
    return order.tolist()
