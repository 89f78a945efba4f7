"""The prices of operators: most layouts of a model share most of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenspeed_plan.planner.graph import Op, OpGraph
from tokenspeed_plan.planner.machines.hardware import HardwareSpec
from tokenspeed_plan.planner.passes.cost import (
    CostedOp,
    Load,
    OpTime,
    costed_op,
    signature,
    time_of,
)


@dataclass(frozen=True, slots=True)
class NumberedOp:
    """An operator with its costs; those with the same number cost the same."""

    op: CostedOp
    number: int


@dataclass(frozen=True, slots=True)
class OpPrice:
    """The time of an operator for a load, and that of its bytes at the peak rate."""

    time: OpTime
    floor_us: float


Known = dict[int, OpPrice]


@dataclass
class OpPrices:
    """Prices on a machine that were computed so far.

    Attributes:
        costed: operators by all that their costs depend on.
        known: prices by load and number.
    """

    hardware: HardwareSpec
    costed: dict[tuple[object, ...], NumberedOp] = field(default_factory=dict)
    known: dict[Load, Known] = field(default_factory=dict)

    def numbered(self, graph: OpGraph, op: Op, load: Load) -> NumberedOp:
        """An operator of a graph, for loads of this format."""
        formats, splits = load.formats, load.context_split
        key = (*signature(graph, op), formats, splits)
        if key not in self.costed:
            costed = costed_op(graph, op, formats, splits)
            self.costed[key] = NumberedOp(costed, len(self.costed))
        return self.costed[key]

    def of_load(self, load: Load) -> Known:
        """Those of a load, for `price`: a load is looked up once for many operators."""
        return self.known.setdefault(load, {})

    def price(self, each: NumberedOp, load: Load, known: Known) -> OpPrice:
        """The price of an operator for a load, whose known ones are given."""
        if each.number not in known:
            work = each.op.work(load)
            floor_us = work.floor_bytes / self.hardware.peak_bytes_per_s * 1e6
            time = time_of(each.op, work, load, self.hardware)
            known[each.number] = OpPrice(time, floor_us)
        return known[each.number]
