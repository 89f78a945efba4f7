"""Library: which calls of a program a library's function takes over, by price, and why.

A program of a prompt is replayed for its first chunk and for chunks behind a long context, so both
count. The kernel stays in the plan: its parts say what the function computes, and it may run where
the library is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tokenspeed_plan.planner.graph import LibraryChoice, LoweredCall, Op, OpGraph
from tokenspeed_plan.planner.ledger import Ledger
from tokenspeed_plan.planner.machines.hardware import HardwareSpec
from tokenspeed_plan.planner.passes.cost import Load, costed_op, kernel_time_of, library_time_of
from tokenspeed_plan.plans.libraries import LIBRARY_FUNCTIONS
from tokenspeed_plan.plans.schema import Option


@dataclass(frozen=True, slots=True)
class Loads:
    """What a program is priced for, and the same tokens behind the workload's mean context."""

    planned: Load
    context_tokens: int

    @property
    def both(self) -> tuple[Load, Load]:
        """The two, of which the second has the longer context."""
        context = max(self.context_tokens, self.planned.context_tokens)
        return self.planned, replace(self.planned, context_tokens=context)


def choose_library(
    graph: OpGraph, op: Op, loads: Loads, hardware: HardwareSpec, num_tokens: int
) -> LibraryChoice | None:
    """The cheapest function that computes an operator, with both prices; None where none does.

    Args:
        graph: of the program.
        op: the operator.
        loads: that both are priced for.
        hardware: the target, with the prices of its functions.
        num_tokens: of the program, at most.
    """
    costed = costed_op(graph, op)
    choices = []
    for name in costed.libraries:
        if name not in hardware.libraries:
            continue
        kernel_us = library_us = 0.0
        for load in loads.both:
            work = costed.work(load)
            kernel_us += kernel_time_of(costed, work, load, hardware).total_us
            library_us += library_time_of(costed, work, load, hardware, name).total_us
        planned = costed.work(loads.planned)
        call_us = library_time_of(costed, planned, loads.planned, hardware, name).total_us
        workspace = LIBRARY_FUNCTIONS[name].workspace_bytes(op.members[0].attrs, num_tokens)
        choices.append(LibraryChoice(name, workspace, call_us, kernel_us / 2, library_us / 2))
    return min(choices, key=lambda choice: choice.library_us, default=None)


def record_libraries(ledger: Ledger, graphs: Sequence[tuple[str, OpGraph]]) -> None:
    """Write down which programs call a library, with the prices of both ways.

    Args:
        ledger: of the compilation.
        graphs: of the programs by name, lowered.
    """
    options: list[Option] = []
    called: dict[str, list[str]] = {}
    for program, graph in graphs:
        choice = next(filter(None, map(_choice_of, graph.calls)), None)
        if choice is None:
            continue
        way = "the plan's kernel"
        if choice.pays:
            way = choice.function
            called.setdefault(way, []).append(program)
        numbers = {
            "kernel_us": round(choice.kernel_us, 1),
            "library_us": round(choice.library_us, 1),
        }
        options.append(Option(what=f"{program}: {way}", numbers=numbers))
    if not options:
        return
    value = "; ".join(f"{name} in {', '.join(found)}" for name, found in sorted(called.items()))
    ledger.record("libraries", value or "none", _REASON, options=tuple(options))


_REASON = (
    "the cheaper of the plan's kernel and the library's function, a call of each on average, once "
    "with the context that the program is priced for and once with the workload's mean"
)


def _choice_of(call: object) -> LibraryChoice | None:
    return call.library if isinstance(call, LoweredCall) else None
