"""Several processes that replay one plan.

Rank 0 schedules, and sends an order before each replay: which program comes next, at which size,
and what has changed in its inputs since the step before. The others do the same. Masks and
adjustments, which are large and come late, have orders of their own, one for each row.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tokenspeed_plan.plans.errors import RankError
from tokenspeed_plan.plans.ops import LATE_INPUTS
from tokenspeed_plan.plans.schema import Program
from tokenspeed_plan.runtime.cache.slot_copies import SlotCopy
from tokenspeed_plan.runtime.execution.bound_programs import Part
from tokenspeed_plan.runtime.execution.executor import Executor, Lead
from tokenspeed_plan.runtime.execution.input_block import InputBlocks, InputChange, InputLayout
from tokenspeed_plan.runtime.execution.order_ring import OrderRing
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory
from tokenspeed_plan.runtime.execution.rank_links import Links

# An order has three numbers: the index of a part of a program, and the tokens and sequences of its
# batch; or one of these, and its two arguments.
STOP = -1
COPY_PAGE = -2
BESIDE = -3  # something else than a replay: the content says what
COPY_SLOTS = -4  # whether back from the host, and how many pages; the numbers follow
END_COPY = -5  # whether back from the host, and its number
WRITE_ROW = -6  # which late input, and the row's number
PARTS: tuple[Part, ...] = ("whole", "head", "tail")
_CHANGE = struct.Struct("<qq")  # the numbers of an `InputChange`; its content follows


class Beside(Protocol):
    """What a rank does beside its replays."""

    def obey(self, content: bytes) -> None:
        """Do what rank 0 says."""

    def poll(self) -> None:
        """Look after what was begun; called again and again."""


class Leader(Lead):
    """Rank 0: sends the others an order before everything it does."""

    def __init__(self, orders: OrderRing) -> None:
        self._orders = orders

    def before_run(
        self,
        memory: PlanMemory,
        program: Program,
        num_tokens: int,
        num_seqs: int,
        change: InputChange | None,
        part: Part,
    ) -> None:
        """Send the program, the size of the batch and what has changed in its inputs."""
        index, content = memory.plan.pool.index_of(program) * len(PARTS) + PARTS.index(part), b""
        if change is not None:
            head = _CHANGE.pack(change.num_moves, change.num_words)
            content = head + change.content.tobytes()
        self._orders.write((index, num_tokens, num_seqs), content)

    def before_write(self, name: str, first: int, rows: Tensor) -> None:
        """Send the rows one by one."""
        for row, words in enumerate(rows.numpy(), start=first):
            self._orders.write((WRITE_ROW, LATE_INPUTS.index(name), row), words.tobytes())

    def before_copy(self, source: int, target: int) -> None:
        """Send the numbers of both pages."""
        self._orders.write((COPY_PAGE, source, target))

    def before_slots(self, copy: SlotCopy) -> None:
        """Send the numbers of all pages and slots."""
        numbers = [*copy.pages, *copy.host_pages, copy.state_slot, copy.host_slot]
        content = np.array(numbers, dtype=np.int64).tobytes()
        self._orders.write((COPY_SLOTS, copy.is_load, len(copy.pages)), content)

    def before_end(self, is_load: bool, number: int) -> None:
        """Send which copy it is."""
        self._orders.write((END_COPY, is_load, number))


def lead_of(links: Links) -> Lead | None:
    """How a rank keeps others in step: rank 0 leads those that there are."""
    if links.orders is None or links.rank:
        return None
    return Leader(links.orders)


def follow(executor: Executor, orders: OrderRing, beside: Beside | None = None) -> None:
    """Carry out the orders of rank 0 until it stops.

    Args:
        executor: of this rank.
        orders: of rank 0.
        beside: what this rank has to do beside replays.

    Raises:
        RankError: a rank is lost.
    """
    blocks = InputBlocks(InputLayout(executor.plan), executor.buffer)
    programs = executor.plan.pool.programs
    poll = None if beside is None else beside.poll
    while True:
        (index, first, second), content = orders.read(poll)
        if index == STOP:
            return
        if index == COPY_PAGE:
            executor.copy_page(first, second)
            continue
        if index == BESIDE:
            assert beside is not None, "the command gives it where the plan has two pools"
            beside.obey(content)
            continue
        if index == COPY_SLOTS:
            executor.start_copy(_slot_copy(bool(first), second, content))
            continue
        if index == END_COPY:
            executor.end_copies(bool(first), second)
            continue
        if index == WRITE_ROW:
            row_W = torch.frombuffer(bytearray(content), dtype=torch.int32)
            executor.write_rows(LATE_INPUTS[first], second, row_W.unsqueeze(0))
            continue
        if content:
            num_moves, num_words = _CHANGE.unpack_from(content)
            words = np.frombuffer(content, np.uint8, offset=_CHANGE.size)
            blocks.receive(InputChange(num_moves, num_words, words))
        number, part = divmod(index, len(PARTS))
        executor.run(programs[number], first, second, part=PARTS[part])


def _slot_copy(is_load: bool, num_pages: int, content: bytes) -> SlotCopy:
    """The copy of an order."""
    *pages, state_slot, host_slot = np.frombuffer(content, np.int64).tolist()
    return SlotCopy(
        is_load, tuple(pages[:num_pages]), tuple(pages[num_pages:]), state_slot, host_slot
    )


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
