"""Lower: each operator becomes the call of a specialised kernel, with arguments and predicted cost.

Every kernel keeps all its candidate tilings: `select` chooses among them once the compiler has
reported. Layers of the same shape share a kernel, since names inside a kernel do not depend on the
layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenspeed_plan.codegen.kernel_builder import Built, build_kernel
from tokenspeed_plan.planner.graph import (
    LibraryChoice,
    LoweredCall,
    LoweredStep,
    Op,
    OpGraph,
    ScheduledOp,
    Stage,
)
from tokenspeed_plan.planner.machines.hardware import HardwareSpec, without_libraries
from tokenspeed_plan.planner.passes.cost import Load, op_time
from tokenspeed_plan.planner.passes.library import Loads, choose_library
from tokenspeed_plan.planner.passes.op_terms import call_cost
from tokenspeed_plan.plans.ops import COLLECTIVES, OPS
from tokenspeed_plan.plans.schema import CollectiveCall, KernelSpec, Param, Part
from tokenspeed_plan.plans.types import TensorSpec


@dataclass(frozen=True, slots=True)
class LoweredProgram:
    """A program whose kernels are known up to their tilings.

    `bucket` is its size: tokens of a prefill program, sequences of a decode program.
    """

    bucket: int
    max_seqs: int
    graph: OpGraph

    @property
    def candidates(self) -> Mapping[str, tuple[Built, ...]]:
        """The tilings of each kernel by its key, best first."""
        return self.graph.candidates


def lower(graph: OpGraph, hardware: HardwareSpec, loads: Loads, sizes: tuple[int, int]) -> OpGraph:
    """The graph with a call for each step, and the candidate tilings of each kernel.

    Args:
        graph: placed.
        hardware: the target.
        loads: what a call is priced for.
        sizes: the most tokens and sequences that the program takes.
    """
    kernels = _Kernels(graph, hardware, sizes)
    calls: list[LoweredStep] = []
    for step in graph.steps:
        if not isinstance(step, ScheduledOp):
            calls.append(step)
            continue
        op = graph.by_name[step.op_name]
        time_us = op_time(graph, op, loads.planned, hardware).total_us
        if op.kind in COLLECTIVES:
            calls.append(_collective(op, step.stream, time_us))
            continue
        args = (*op.inputs, *op.weights, *(name for name, _ in op.states), *op.outputs)
        key = kernels.key_of(op)
        library = choose_library(graph, op, loads, hardware, sizes[0])
        if library is not None:
            time_us = _chosen_us(graph, op, loads.planned, hardware, library)
        cost = call_cost(graph, op)
        calls.append(LoweredCall(key, args, step.stream, time_us, cost, library))
    return graph.to(Stage.LOWERED, calls=tuple(calls), candidates=kernels.candidates)


def _chosen_us(
    graph: OpGraph, op: Op, load: Load, hardware: HardwareSpec, library: LibraryChoice
) -> float:
    """Of the call that the program makes: the library's, or the kernel's."""
    if library.pays:
        return library.call_us
    return op_time(graph, op, load, without_libraries(hardware)).total_us


def _collective(op: Op, stream: int, time_us: float) -> CollectiveCall:
    return CollectiveCall.model_validate(
        {
            "op": op.kind,
            "source": op.inputs[0],
            "target": op.outputs[0],
            "stream": stream,
            "predicted_us": time_us,
        }
    )


@dataclass
class _Kernels:
    """The distinct kernels of one program. A kernel's key is the name that its best tiling has."""

    graph: OpGraph
    hardware: HardwareSpec
    sizes: tuple[int, int]
    candidates: dict[str, tuple[Built, ...]] = field(default_factory=dict)
    keys: dict[tuple[str, str], str] = field(default_factory=dict)

    def key_of(self, op: Op) -> str:
        """The key of an operator's kernel, whose tilings are built when it is new."""
        plain = _kernel(self.graph, op)
        content = (op.kind, plain.model_dump_json())
        if content not in self.keys:
            launched_by_kernels = self.graph.phase == "decode"
            tilings = build_kernel(op.kind, plain, self.sizes, self.hardware, launched_by_kernels)
            key = tilings[0].kernel.name
            self.keys[content] = key
            self.candidates[key] = tuple(tilings)
        return self.keys[content]


def memory_name(kernel: KernelSpec, param: Param) -> str:
    """The buffer of a kernel's scratch, or the one of all kernels for a part of peer memory.

    All calls share it, which run one after the other.
    """
    if param.role == "symmetric":
        return param.name
    return f"{kernel.name}.{param.name}"


def _kernel(graph: OpGraph, op: Op) -> KernelSpec:
    """The kernel without a tiling: its parameters and parts, under local names."""
    local = _local_names(op)
    params: list[Param] = []
    for name in op.inputs:
        params.append(Param(name=local[name], role="input", tensor=_spec(graph, name)))
    for name in op.weights:
        spec = graph.weights[name].spec
        params.append(Param(name=local[name], role="weight", tensor=spec))
    for name, access in op.states:
        spec = _spec(graph, name)
        params.append(Param(name=local[name], role="state", tensor=spec, access=access))
    for name in op.outputs:
        spec = _spec(graph, name)
        params.append(Param(name=local[name], role="output", tensor=spec, access="write"))
    parts = tuple(_part(member, local) for member in op.members)
    return KernelSpec(name="", params=tuple(params), parts=parts)


def _part(member: Op, local: Mapping[str, str]) -> Part:
    return Part(
        kind=member.kind,
        operands=tuple(local[name] for name in member.operands),
        outputs=tuple(local[name] for name in member.outputs),
        attrs=dict(member.attrs),
        rank_attrs=dict(member.rank_attrs),
    )


def _spec(graph: OpGraph, name: str) -> TensorSpec:
    return graph.tensors[name].spec


def _local_names(op: Op) -> Mapping[str, str]:
    """tensor -> name inside the kernel: its first role, after its operator's kind where fused."""
    names: dict[str, str] = {}
    for member in op.members:
        roles = zip(OPS[member.kind].operands, member.operands, strict=True)
        outs = zip(_output_roles(member), member.outputs, strict=True)
        for role, tensor in (*roles, *outs):
            local = f"{member.kind}_{role}" if op.parts else role
            names.setdefault(tensor, _unused(local, set(names.values())))
    return names


def _unused(name: str, taken: set[str]) -> str:
    """The name, or the first of `name2`, `name3` and so on that is not taken."""
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name}{number}", number + 1
    return candidate


def _output_roles(op: Op) -> tuple[str, ...]:
    if op.kind == "linear":
        return tuple(f"y{i}" for i in range(len(op.outputs)))
    return OPS[op.kind].outputs
