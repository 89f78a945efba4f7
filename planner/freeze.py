"""From lowered graphs to the plan: nothing is decided here any more, only written down."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenspeed_plan.codegen.kernel_builder import Built
from tokenspeed_plan.planner.advisor.hardware import GIB, HardwareSpec
from tokenspeed_plan.planner.graph import OpGraph, Tensor, Weight
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.passes.lower import scratch_name
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.schema import (
    SCHEMA_VERSION,
    ArenaSpec,
    AttentionLayout,
    BufferSpec,
    Decision,
    KernelSpec,
    Layout,
    Limits,
    Memory,
    ModelFacts,
    MoeLayout,
    Piece,
    Plan,
    Pool,
    Predicted,
    Program,
    Shift,
    Target,
    WeightSpec,
    shared_bytes,
)
from tokenspeed_plan.plans.types import aligned

LoweredProgram = tuple[int, int, OpGraph, dict[str, Built]]


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that goes into a plan."""

    spec: Spec
    facts: ModelFacts
    hardware: HardwareSpec
    layout: ParallelLayout
    limits: Limits
    decisions: tuple[Decision, ...]
    predicted: Predicted
    programs: list[LoweredProgram]
    compiler_version: str


def freeze(parts: Parts) -> Plan:
    """The plan, not sealed yet.

    Raises:
        SpecError: it does not fit a rank's memory; the map is in the message.
    """
    graphs = [graph for _, _, graph, _ in parts.programs]
    weights, weight_bytes = _place_weights(
        {name: w for graph in graphs for name, w in graph.weights.items()}.values()
    )
    kernels = {
        name: built.kernel
        for _, _, _, made in parts.programs
        for name, built in sorted(made.items())
    }
    programs = tuple(
        _program(bucket, seqs, graph, graph.phase != "prefill" and parts.hardware.sm > 0)
        for bucket, seqs, graph, _ in parts.programs
    )
    buffers, arena_bytes = _place_shared(graphs, kernels.values(), programs)
    arena_bytes |= {
        "weights": weight_bytes,
        "activations": max(graph.arena_bytes for graph in graphs),
    }
    pool = Pool(
        role="both",
        layout=Layout(
            attention=AttentionLayout(tp=parts.layout.attention_tp),
            moe=MoeLayout(tp=parts.layout.moe_tp, ep=parts.layout.moe_ep),
        ),
        limits=parts.limits,
        memory_bytes_per_rank=_memory(arena_bytes, parts.hardware),
        arenas=tuple(
            ArenaSpec(name=name, size_bytes=arena_bytes[name]) for name in sorted(arena_bytes)
        ),  # type: ignore[arg-type]
        weights=weights,
        buffers=buffers,
        programs=programs,
    )
    return Plan(
        schema_version=SCHEMA_VERSION,
        compiler_version=parts.compiler_version,
        digest="",
        spec=parts.spec.model_dump(mode="json", exclude_none=True),
        model=parts.facts,
        target=Target(gpu=parts.hardware.name, count=parts.layout.num_ranks, sm=parts.hardware.sm),
        pools=(pool,),
        decisions=parts.decisions,
        predicted=parts.predicted,
        kernels=tuple(kernels[name] for name in sorted(kernels)),
    )


def _place_weights(weights: Iterable[Weight]) -> tuple[tuple[WeightSpec, ...], int]:
    placed, top = [], 0
    for weight in weights:
        placed.append(
            WeightSpec(
                name=weight.name, offset_bytes=top, tensor=weight.spec, pieces=_pieces(weight)
            )
        )
        top += aligned(weight.spec.size_bytes())
    return tuple(placed), top


def _pieces(weight: Weight) -> tuple[Piece, ...]:
    pieces, joined = [], 0
    for source in weight.sources:
        at = tuple(joined if dim == weight.join_dim else 0 for dim in range(len(source.size)))
        shifts = tuple(Shift(dim=dim, by=by) for dim, by in source.ranks)
        pieces.append(
            Piece(source=source.name, start=source.start, size=source.size, at=at, shifts=shifts)
        )
        joined += source.size[weight.join_dim]
    return tuple(pieces)


def _place_shared(
    graphs: list[OpGraph], kernels: Iterable[KernelSpec], programs: Sequence[Program]
) -> tuple[tuple[BufferSpec, ...], dict[str, int]]:
    """State, io and scratch buffers: they outlive a program, so each has a place of its own."""
    shared: dict[str, Tensor] = {}
    for graph in graphs:
        shared |= {
            name: tensor for name, tensor in graph.tensors.items() if tensor.arena != "activations"
        }
    for kernel in kernels:
        scratch = (param for param in kernel.params if param.role == "scratch")
        shared |= {
            name: Tensor(name, param.tensor, "scratch")
            for param in scratch
            if (name := scratch_name(kernel, param))
        }
    sizes = shared_bytes({name: tensor.spec for name, tensor in shared.items()}, programs)
    tops = {"kv_cache": 0, "state": 0, "io": 0, "scratch": 0}
    buffers = []
    for tensor in shared.values():
        buffers.append(
            BufferSpec(
                name=tensor.name,
                arena=tensor.arena,
                offset_bytes=tops[tensor.arena],
                tensor=tensor.spec,
            )
        )
        tops[tensor.arena] += aligned(sizes[tensor.name])
    return tuple(buffers), tops


def _memory(arena_bytes: dict[str, int], hardware: HardwareSpec) -> Memory:
    total = sum(arena_bytes.values()) + hardware.reserved_bytes
    if total > hardware.memory_bytes:
        rows = ", ".join(f"{name} {size / GIB:.2f}" for name, size in sorted(arena_bytes.items()))
        raise SpecError(
            f"needs {total / GIB:.2f} GiB on each {hardware.name}, which has {hardware.memory_bytes / GIB:.2f}"
            f" ({rows}, reserved {hardware.reserved_bytes / GIB:.2f} GiB)",
            "raise `target.count`, or lower `workload.concurrency` or its tokens",
        )
    return Memory(
        **arena_bytes, reserved=hardware.reserved_bytes, total=total, capacity=hardware.memory_bytes
    )


def _program(bucket: int, max_seqs: int, graph: OpGraph, captured: bool) -> Program:
    used = [name for op in graph.ordered() for name in op.outputs]
    buffers = tuple(
        BufferSpec(
            name=name,
            arena="activations",
            offset_bytes=graph.offsets[name],
            tensor=graph.tensors[name].spec,
        )
        for name in used
        if graph.tensors[name].arena == "activations"
    )
    return Program(
        phase=graph.phase,
        bucket=bucket,
        max_tokens=bucket * (graph.depth + 1 if graph.phase == "decode" else 1),
        max_seqs=max_seqs,
        inputs=graph.inputs,
        outputs=graph.outputs,
        buffers=buffers,
        steps=graph.steps,
        num_streams=graph.num_streams,
        captured=captured,
        predicted_us=round(graph.time_us, 2),
        depth=graph.depth,
    )
