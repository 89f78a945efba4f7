"""Several processes that replay one plan.

Rank 0 schedules, and sends an order before each replay: which program comes next, at which size,
and its inputs, unless the step before has left them on the device. The others do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from torch import Tensor

from tokenspeed_plan.plans.errors import RankError
from tokenspeed_plan.plans.schema import Plan, Program
from tokenspeed_plan.runtime.execution.executor import Executor, Lead
from tokenspeed_plan.runtime.execution.order_ring import OrderRing
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory
from tokenspeed_plan.runtime.execution.rank_inputs import InputBlocks
from tokenspeed_plan.runtime.execution.rank_links import Links

# An order has three numbers: the index of a program, and the tokens and sequences of its batch; or
# one of these, and its two arguments.
STOP = -1
COPY_PAGE = -2


class Leader:
    """Rank 0: sends the others an order before everything it does."""

    def __init__(self, orders: OrderRing) -> None:
        self._orders = orders
        self._blocks: InputBlocks | None = None
        self._is_filled = False
        self._indices: dict[tuple[str, int], int] = {}

    def inputs_of(
        self, memory: PlanMemory, program: Program, num_tokens: int, num_seqs: int
    ) -> Callable[[str], Tensor]:
        """The input buffers on the host; they go to all devices before the next replay."""
        if self._blocks is None:
            self._blocks = InputBlocks(memory)
        self._is_filled = True
        return self._blocks.take(program, num_tokens, num_seqs).__getitem__

    def before_run(
        self, memory: PlanMemory, program: Program, num_tokens: int, num_seqs: int
    ) -> None:
        """Send the program, the size of the batch and new inputs."""
        index, content = self._index_of(program, memory.plan), b""
        if self._is_filled and self._blocks is not None:
            content = self._blocks.bytes_of(program, num_tokens, num_seqs)
            self._blocks.copy_to_buffers(program, num_tokens, num_seqs)
        self._is_filled = False
        self._orders.write((index, num_tokens, num_seqs), content)

    def _index_of(self, program: Program, plan: Plan) -> int:
        """The place of a program in its pool."""
        if not self._indices:
            for index, each in enumerate(plan.pool.programs):
                self._indices[each.phase, each.bucket] = index
        return self._indices[program.phase, program.bucket]

    def before_copy(self, source: int, target: int) -> None:
        """Send the numbers of both pages."""
        self._orders.write((COPY_PAGE, source, target))


def lead_of(links: Links) -> Lead | None:
    """How a rank keeps others in step: rank 0 leads those that there are."""
    if links.orders is None or links.rank:
        return None
    return Leader(links.orders)


def follow(executor: Executor, orders: OrderRing) -> None:
    """Carry out the orders of rank 0 until it stops.

    Raises:
        RankError: a rank is lost.
    """
    blocks = InputBlocks(executor.memory)
    programs = executor.plan.pool.programs
    while True:
        (index, first, second), content = orders.read()
        if index == STOP:
            return
        if index == COPY_PAGE:
            executor.copy_page(first, second)
            continue
        if content:
            blocks.receive(content)
            blocks.copy_to_buffers(programs[index], first, second)
        executor.run(programs[index], first, second)


@contextmanager
def leading(links: Links) -> Iterator[None]:
    """Stop the other ranks when rank 0 ends, in whatever way."""
    is_linked = True
    try:
        yield
    except RankError:
        is_linked = False  # the others find out by themselves; one of them may read nothing more
        raise
    finally:
        if is_linked and links.orders is not None:
            with suppress(RankError):  # they may have ended already
                links.orders.write((STOP, 0, 0))
