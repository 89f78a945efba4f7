"""Lower: each operator becomes a call of a specialised kernel, with its arguments and its predicted time.

Layers and programs of the same shape share a kernel: names inside a kernel do not depend on the
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import itemgetter

from tokenspeed_plan.codegen.kernel_builder import Built, build_kernel
from tokenspeed_plan.planner.advisor.hardware import HardwareSpec
from tokenspeed_plan.planner.graph import Op, OpGraph, Stage
from tokenspeed_plan.planner.passes.cost import Load, op_time
from tokenspeed_plan.planner.passes.schedule import ops_by_step, step_key
from tokenspeed_plan.plans.ops import OPS
from tokenspeed_plan.plans.schema import CollectiveCall, KernelCall, KernelSpec, Param, Part, Step
from tokenspeed_plan.plans.types import TensorSpec

Choose = Callable[[list[Built]], Built]


def lower(
    graph: OpGraph,
    hardware: HardwareSpec,
    load: Load,
    rows: tuple[int, int],
    choose: Choose = itemgetter(0),
) -> tuple[OpGraph, dict[str, Built]]:
    """The graph with calls for steps, and the kernels that they call, by name.

    The program takes at most `rows` tokens and sequences; `choose` picks among a kernel's tilings.
    """
    kernels: dict[str, Built] = {}
    made: dict[tuple[str, str], Built] = {}
    by_step = ops_by_step(graph)
    steps: list[Step] = []
    for step in graph.steps:
        if isinstance(step, KernelCall):
            op = by_step[step_key(step)]
            plain = _kernel(graph, op)
            key = (op.kind, plain.model_dump_json())
            if key not in made:
                made[key] = choose(
                    build_kernel(op.kind, plain, rows, hardware, graph.phase == "decode")
                )
            kernel = made[key].kernel
            kernels[kernel.name] = made[key]
            scratch = (
                scratch_name(kernel, param) for param in kernel.params if param.role == "scratch"
            )
            args = (
                *op.inputs,
                *op.weights,
                *(name for name, _ in op.states),
                *op.outputs,
                *scratch,
            )
            steps.append(
                KernelCall(
                    kernel=kernel.name,
                    args=args,
                    stream=step.stream,
                    predicted_us=op_time(graph, op, load, hardware).total_us,
                )
            )
        elif isinstance(step, CollectiveCall):
            time_us = op_time(graph, by_step[step_key(step)], load, hardware).total_us
            steps.append(step.model_copy(update={"predicted_us": time_us}))
        else:
            steps.append(step)
    return replace(graph, stage=Stage.LOWERED, steps=tuple(steps)), kernels


def scratch_name(kernel: KernelSpec, param: Param) -> str:
    """The buffer of a kernel's scratch: one for all of its calls, which come one after the other."""
    return f"{kernel.name}.{param.name}"


def _kernel(graph: OpGraph, op: Op) -> KernelSpec:
    local = _local_names(op)
    access = dict(op.states)
    params = [
        Param(name=local[name], role="input", tensor=_spec(graph, name)) for name in op.inputs
    ]
    params += [
        Param(name=local[name], role="weight", tensor=graph.weights[name].spec)
        for name in op.weights
    ]
    params += [
        Param(name=local[name], role="state", tensor=graph.tensors[name].spec, access=access[name])
        for name in access
    ]
    params += [
        Param(name=local[name], role="output", tensor=_spec(graph, name), access="write")
        for name in op.outputs
    ]
    parts = tuple(
        Part(
            kind=member.kind,
            operands=tuple(local[name] for name in member.operands),
            outputs=tuple(local[name] for name in member.outputs),
            attrs=dict(member.attrs),
            rank_attrs=dict(member.rank_attrs),
        )
        for member in op.members
    )
    return KernelSpec(name="", params=tuple(params), parts=parts)


def _spec(graph: OpGraph, name: str) -> TensorSpec:
    return graph.tensors[name].spec


def _local_names(op: Op) -> Mapping[str, str]:
    """tensor -> name inside the kernel: its first role, after the operator's kind where there are several."""
    names: dict[str, str] = {}
    for member in op.members:
        roles = zip(OPS[member.kind].operands, member.operands, strict=True)
        outs = zip(_output_roles(member), member.outputs, strict=True)
        for role, tensor in (*roles, *outs):
            wanted = f"{member.kind}_{role}" if op.parts else role
            taken = set(names.values())
            suffix = next(
                text for text in ("", *map(str, range(2, 99))) if f"{wanted}{text}" not in taken
            )
            names.setdefault(tensor, f"{wanted}{suffix}")
    return names


def _output_roles(op: Op) -> tuple[str, ...]:
    return (
        tuple(f"y{i}" for i in range(len(op.outputs)))
        if op.kind == "linear"
        else OPS[op.kind].outputs
    )
