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
        function = LIBRARY_FUNCTIONS[name]
        if name not in hardware.libraries or num_tokens < function.least_tokens:
            continue
        kernel_us = library_us = 0.0
        for load in loads.both:
            work = costed.work(load)
            kernel_us += kernel_time_of(costed, work, load, hardware).total_us
            library_us += library_time_of(costed, work, load, hardware, name).total_us
        planned = costed.work(loads.planned)
        call_us = library_time_of(costed, planned, loads.planned, hardware, name).total_us
        workspace = function.workspace_bytes(op.members[0].attrs, num_tokens)
        choices.append(
            LibraryChoice(
                name,
                _operator(graph, op),
                workspace,
                call_us,
                kernel_us / 2,
                library_us / 2,
                hardware.libraries[name].asked,
            )
        )
    return min(choices, key=lambda choice: choice.library_us, default=None)


def _operator(graph: OpGraph, op: Op) -> str:
    """What is computed, with the shape of its weight."""
    shapes = ["x".join(map(str, graph.weights[name].spec.shape)) for name in op.weights]
    return " ".join((op.kind, *shapes))


def record_libraries(ledger: Ledger, graphs: Sequence[tuple[str, OpGraph]]) -> None:
    """Write down which programs call a library, with the prices of both ways.

    Args:
        ledger: of the compilation.
        graphs: of the programs by name, lowered.
    """
    options: list[Option] = []
    called: dict[str, list[str]] = {}
    for program, graph in graphs:
        for choice in _distinct(graph):
            way = "the plan's kernel"
            if choice.pays:
                way = choice.function
                programs = called.setdefault(way, [])
                programs += [program] * (program not in programs)
            numbers = {
                "kernel_us": round(choice.kernel_us, 1),
                "library_us": round(choice.library_us, 1),
            }
            what = f"{program}, {choice.function} for {choice.operator}: {way}"
            options.append(Option(what=what, numbers=numbers))
    if not options:
        return
    value = "; ".join(f"{name} in {', '.join(found)}" for name, found in sorted(called.items()))
    ledger.record("libraries", value or "none", _REASON, options=tuple(options))


_REASON = (
    "the library's function where the spec asks for it, or where it is more than 3 % cheaper than "
    "the plan's kernel, a call of "
    "each on average, once with the context that the program is priced for and once with the "
    "workload's mean"
)


def _distinct(graph: OpGraph) -> list[LibraryChoice]:
    """The choices of a program, once for calls of one kernel."""
    found: dict[str, LibraryChoice] = {}
    for call in graph.calls:
        if isinstance(call, LoweredCall) and call.library is not None:
            found.setdefault(call.key, call.library)
    return list(found.values())
