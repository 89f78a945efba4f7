"""How ranks add up in a program: kernels push to their peers, or a library does it, by price.

A kernel that pushes has the residual sum and the norm in it, and is one launch less. It sends all
of a rank's part to each peer, where the library sends each byte twice at most: of two ranks that is
the same, of eight nearly four times as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenspeed_plan.planner.graph import Op, OpGraph
from tokenspeed_plan.planner.ledger import Ledger
from tokenspeed_plan.planner.machines.hardware import HardwareSpec, library_us, push_us
from tokenspeed_plan.planner.passes.lower import LoweredProgram
from tokenspeed_plan.plans.ops import integer
from tokenspeed_plan.plans.peer_memory import peer_specs
from tokenspeed_plan.plans.schema import Option
from tokenspeed_plan.plans.types import TensorSpec, aligned


@dataclass(frozen=True, slots=True)
class Reduction:
    """The largest sum over ranks of a program, with a residual and a norm after it.

    Attributes:
        tensor: what is added up.
        num_ranks: that add up.
        rows: of it.
        push_us: of one kernel.
        library_us: of the library and the kernel after it.
    """

    tensor: TensorSpec
    num_ranks: int
    rows: int
    push_us: float
    library_us: float

    @property
    def pushes(self) -> bool:
        """Whether kernels push."""
        return self.push_us <= self.library_us


def largest_reduction(
    graph: OpGraph, hardware: HardwareSpec, num_tokens: int, num_seqs: int
) -> Reduction | None:
    """The largest sum over ranks of a program of so many tokens and sequences, None without one."""

    def num_rows(op: Op) -> int:
        return graph.tensors[op.inputs[0]].spec.bind(num_tokens, num_seqs)[0]

    largest = max(_all_reduces(graph), key=num_rows, default=None)
    if largest is None:
        return None
    return _reduction(graph, largest, hardware, num_tokens, num_seqs)


def _all_reduces(graph: OpGraph) -> list[Op]:
    return [part for op in graph.ops for part in op.members if part.kind == "all_reduce"]


def _reduction(
    graph: OpGraph, op: Op, hardware: HardwareSpec, num_tokens: int, num_seqs: int
) -> Reduction:
    tensor = graph.tensors[op.inputs[0]].spec
    rows, *_ = tensor.bind(num_tokens, num_seqs)
    size_bytes = tensor.size_bytes(num_tokens, num_seqs)
    num_ranks = integer(op.attrs, "num_ranks")
    return Reduction(
        tensor=tensor,
        num_ranks=num_ranks,
        rows=rows,
        push_us=push_us(hardware, size_bytes, num_ranks),
        library_us=library_us(hardware, size_bytes, num_ranks) + _norm_us(hardware, size_bytes),
    )


def _norm_us(hardware: HardwareSpec, size_bytes: int) -> float:
    """Microseconds of the kernel after the library's sum: it reads two tensors and writes two."""
    busy_us = 4 * size_bytes / hardware.read_bytes_per_s * 1e6 * hardware.residuals["rows"]
    return hardware.launch_us + hardware.waits_us["rows"] + busy_us


def peer_bytes(reduction: Reduction | None, num_tokens: int, num_seqs: int) -> int:
    """Bytes of peer memory that a program needs, each buffer aligned."""
    if reduction is None or not reduction.pushes or reduction.num_ranks == 1:
        return 0
    specs = peer_specs(reduction.tensor, reduction.num_ranks)
    return sum(aligned(spec.size_bytes(num_tokens, num_seqs)) for spec in specs.values())


def record_reductions(
    ledger: Ledger, programs: Sequence[LoweredProgram], hardware: HardwareSpec
) -> None:
    """Write down how the programs of several ranks add up."""
    pushing: list[str] = []
    options: list[Option] = []
    for program in programs:
        graph = program.graph
        num_tokens = program.bucket * graph.num_queries
        found = largest_reduction(graph, hardware, num_tokens, program.max_seqs)
        if found is None:
            continue
        name, way = f"{graph.phase}/{program.bucket}", "the library"
        if _is_pushed(graph):
            pushing.append(name)
            way = "kernels push"
        numbers = {"push_us": round(found.push_us, 1), "library_us": round(found.library_us, 1)}
        options.append(Option(what=f"{name} ({found.rows} rows): {way}", numbers=numbers))
    if not options:
        return
    value = "the library adds up"
    if pushing:
        value = f"kernels push in {', '.join(pushing)}"
    if 0 < len(pushing) < len(options):
        value += "; the library adds up in the others"
    ledger.record("all_reduce", value, _REASON, options=tuple(options))


_REASON = (
    "the cheaper of a kernel that pushes its rows to all peers, with residual and norm in it, and "
    "of the library with a kernel after it; the library adds up in all programs where a machine's "
    "GPUs cannot write to each other"
)


def _is_pushed(graph: OpGraph) -> bool:
    return any(part.kind == "all_reduce" for op in graph.ops for part in op.parts)
