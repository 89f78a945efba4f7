"""From lowered programs to the plan: nothing is decided here, only written down."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tokenspeed_plan.codegen.kernel_builder import Built
from tokenspeed_plan.planner.graph import (
    LibraryChoice,
    LoweredCall,
    LoweredStep,
    OpGraph,
    Source,
    Tensor,
    Weight,
)
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.machines.hardware import HardwareSpec
from tokenspeed_plan.planner.passes.handover import with_pushes
from tokenspeed_plan.planner.passes.lower import LoweredProgram, memory_name
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.libraries import LIBRARY_FUNCTIONS
from tokenspeed_plan.plans.schema import (
    SCHEMA_VERSION,
    AnswerReturns,
    ArenaName,
    ArenaSpec,
    AttentionLayout,
    BufferSpec,
    Decision,
    HostCache,
    KernelCall,
    KernelSpec,
    Layout,
    LibraryCall,
    Limits,
    Memory,
    ModelFacts,
    MoeLayout,
    Piece,
    Plan,
    Pool,
    PoolRole,
    Predicted,
    Program,
    Shift,
    Step,
    Target,
    WeightSpec,
    shared_bytes,
)
from tokenspeed_plan.plans.types import GIB, aligned
from tokenspeed_plan.plans.validate.pool_rules import cached_tensors

Chosen = Mapping[str, Built]  # the tiling of each kernel by its key


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that goes into a plan, except which tiling each kernel has.

    With a `prefill_layout` there is a pool beside the one that answers: it has the same limits, and
    its own programs, for prompts alone.
    """

    spec: Spec
    facts: ModelFacts
    hardware: HardwareSpec
    layout: ParallelLayout
    limits: Limits
    decisions: tuple[Decision, ...]
    predicted: Predicted
    programs: tuple[LoweredProgram, ...]
    compiler_version: str
    prefill_layout: ParallelLayout | None = None
    prefill_programs: tuple[LoweredProgram, ...] = ()
    host_cache: HostCache | None = None
    answer_returns: AnswerReturns | None = None

    @property
    def candidates(self) -> dict[str, tuple[Built, ...]]:
        """The tilings of all kernels by key, best first."""
        merged: dict[str, tuple[Built, ...]] = {}
        for program in (*self.programs, *self.prefill_programs):
            merged |= program.candidates
        return merged


def freeze(parts: Parts, chosen: Chosen) -> Plan:
    """The plan, not sealed yet.

    Raises:
        SpecError: it does not fit a rank's memory; the map is in the message.
    """
    kernels = _kernels((*parts.programs, *parts.prefill_programs), chosen)
    pools = tuple(_pools(parts, chosen))
    count = sum(pool.layout.num_ranks for pool in pools)
    target = Target(gpu=parts.hardware.name, count=count, sm=parts.hardware.sm)
    return Plan(
        schema_version=SCHEMA_VERSION,
        compiler_version=parts.compiler_version,
        digest="",
        spec=parts.spec.model_dump(mode="json", exclude_none=True),
        model=parts.facts,
        target=target,
        pools=pools,
        decisions=parts.decisions,
        predicted=parts.predicted,
        kernels=tuple(kernels[name] for name in sorted(kernels)),
    )


def _kernels(programs: Sequence[LoweredProgram], chosen: Chosen) -> dict[str, KernelSpec]:
    """The chosen kernels by name, program by program."""
    kernels: dict[str, KernelSpec] = {}
    for program in programs:
        used = {chosen[key].kernel.name: chosen[key].kernel for key in program.candidates}
        kernels |= dict(sorted(used.items()))
    return kernels


def _pools(parts: Parts, chosen: Chosen) -> Iterator[Pool]:
    """The pool that answers comes first."""
    if parts.prefill_layout is None:
        yield _pool(parts, "both", chosen)
        return
    yield _pool(parts, "decode", chosen)
    prompts = parts.prefill_programs
    prefill = replace(parts, layout=parts.prefill_layout, programs=prompts)
    pool = _pool(prefill, "prefill", chosen)
    programs = [with_pushes(program, cached_tensors(pool).keys()) for program in pool.programs]
    changes = {"programs": tuple(programs), "answer_returns": parts.answer_returns}
    yield pool.model_copy(update=changes)


def _pool(parts: Parts, role: PoolRole, chosen: Chosen) -> Pool:
    kernels = _kernels(parts.programs, chosen)
    graphs = [program.graph for program in parts.programs]
    all_weights: dict[str, Weight] = {}
    for graph in graphs:
        all_weights |= graph.weights
    weights, weight_bytes = _place_weights(all_weights.values())
    on_gpu = parts.hardware.sm > 0
    fallback = parts.spec.target.libraries != "required"
    programs = tuple(_program(program, chosen, on_gpu, fallback) for program in parts.programs)
    tensors = _shared_tensors(graphs, kernels.values())
    buffers, arena_bytes = _place_shared(tensors, programs)
    arena_bytes["activations"] = max(graph.activation_bytes for graph in graphs)
    arena_bytes["weights"] = weight_bytes
    return Pool(
        role=role,
        layout=_layout(parts.layout),
        limits=parts.limits,
        memory_bytes_per_rank=_memory(arena_bytes, parts.hardware, _workspace_bytes(programs)),
        arenas=tuple(
            ArenaSpec(name=name, size_bytes=size) for name, size in sorted(arena_bytes.items())
        ),
        weights=weights,
        buffers=buffers,
        programs=programs,
        host_cache=parts.host_cache,
    )


def _layout(layout: ParallelLayout) -> Layout:
    return Layout(
        attention=AttentionLayout(tp=layout.attention_tp),
        moe=MoeLayout(tp=layout.moe_tp, ep=layout.moe_ep),
    )


def _place_weights(weights: Iterable[Weight]) -> tuple[tuple[WeightSpec, ...], int]:
    """The weights one after the other, and the bytes that they need."""
    placed, top = [], 0
    for weight in weights:
        pieces = _pieces(weight)
        placed.append(
            WeightSpec(
                name=weight.name,
                offset_bytes=top,
                tensor=weight.spec,
                pieces=pieces,
                rounds=weight.rounds,
            )
        )
        top += aligned(weight.spec.size_bytes())
    return tuple(placed), top


def _pieces(weight: Weight) -> tuple[Piece, ...]:
    """The sources of a weight, side by side along its joined dimension."""
    pieces, joined = [], 0
    for source in weight.sources:
        at = [0] * len(source.size)
        at[weight.join_dim] = joined
        pieces.append(_piece(source, tuple(at)))
        joined += source.size[weight.join_dim]
    return tuple(pieces)


def _piece(source: Source, at: tuple[int, ...]) -> Piece:
    shifts = tuple(Shift(dim=dim, by=by) for dim, by in source.ranks)
    encoding = source.encoding
    if encoding == "fp8_blocks":  # what its format says already
        encoding = None
    return Piece(
        source=source.name,
        start=source.start,
        size=source.size,
        at=at,
        shifts=shifts,
        encoding=encoding,
    )


def _place_shared(
    shared: Mapping[str, Tensor], programs: Sequence[Program]
) -> tuple[tuple[BufferSpec, ...], dict[ArenaName, int]]:
    """State, io, scratch and peer memory, which outlive a program: each has a place of its own.

    One rank has no symmetric arena.
    """
    sizes = shared_bytes({name: tensor.spec for name, tensor in shared.items()}, programs)
    tops: dict[ArenaName, int] = {"kv_cache": 0, "state": 0, "io": 0, "scratch": 0}
    buffers = []
    for name, tensor in shared.items():
        offset = tops.get(tensor.arena, 0)
        buffers.append(
            BufferSpec(name=name, arena=tensor.arena, offset_bytes=offset, tensor=tensor.spec)
        )
        tops[tensor.arena] = offset + aligned(sizes[name])
    return tuple(buffers), tops


def _shared_tensors(graphs: Sequence[OpGraph], kernels: Iterable[KernelSpec]) -> dict[str, Tensor]:
    shared: dict[str, Tensor] = {}
    for graph in graphs:
        for name, tensor in graph.tensors.items():
            if tensor.arena != "activations":
                shared[name] = tensor
    for kernel in kernels:
        for param in kernel.params:
            if param.role in ("scratch", "symmetric"):
                name = memory_name(kernel, param)
                shared[name] = Tensor(name, param.tensor, param.role)
    return shared


def _workspace_bytes(programs: Sequence[Program]) -> int:
    """What one library call takes at most; calls come one after the other."""
    calls = [step for program in programs for step in program.steps]
    return max((call.workspace_bytes for call in calls if isinstance(call, LibraryCall)), default=0)


def _memory(
    arena_bytes: Mapping[ArenaName, int], hardware: HardwareSpec, workspace_bytes: int
) -> Memory:
    """The map of a rank; what libraries take is reserved beside the profile's margin."""
    reserved = hardware.reserved_bytes + workspace_bytes
    total = sum(arena_bytes.values()) + reserved
    if total > hardware.memory_bytes:
        sizes = [*sorted(arena_bytes.items()), ("reserved", reserved)]
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in sizes)
        capacity = hardware.memory_bytes / GIB
        raise SpecError(
            f"needs {total / GIB:.2f} GiB on each {hardware.name}, which has {capacity:.2f} "
            f"({parts} GiB)",
            "raise `target.count`, or lower `workload.concurrency` or its tokens",
        )
    rest = {"reserved": reserved, "total": total, "capacity": hardware.memory_bytes}
    return Memory.model_validate({**arena_bytes, **rest})


def _program(program: LoweredProgram, chosen: Chosen, on_gpu: bool, fallback: bool) -> Program:
    graph = program.graph
    return Program(
        phase=graph.phase,
        bucket=program.bucket,
        max_tokens=program.bucket * graph.num_queries,
        max_seqs=program.max_seqs,
        inputs=graph.inputs,
        outputs=graph.outputs,
        buffers=_activations(graph),
        steps=tuple(_step(step, chosen, fallback) for step in graph.calls),
        num_streams=graph.num_streams,
        captured=on_gpu and graph.phase != "prefill",
        predicted_us=round(graph.time_us, 2),
        depth=graph.depth,
    )


def _activations(graph: OpGraph) -> tuple[BufferSpec, ...]:
    """The buffers of one program, in the order in which they are written."""
    buffers = []
    for name in (name for op in graph.ordered() for name in op.outputs):
        tensor = graph.tensors[name]
        if tensor.arena == "activations":
            offset = graph.offsets[name]
            buffers.append(
                BufferSpec(name=name, arena=tensor.arena, offset_bytes=offset, tensor=tensor.spec)
            )
    return tuple(buffers)


def _step(step: LoweredStep, chosen: Chosen, fallback: bool) -> Step:
    """The step of the plan: a call is bound to the kernel that was chosen, and gets its memory."""
    if not isinstance(step, LoweredCall):
        return step
    kernel = chosen[step.key].kernel
    memory = [
        memory_name(kernel, param)
        for param in kernel.params
        if param.role in ("scratch", "symmetric")
    ]
    call = KernelCall(
        kernel=kernel.name,
        args=(*step.args, *memory),
        stream=step.stream,
        predicted_us=step.predicted_us,
        cost=step.cost,
    )
    if step.library is None or not step.library.pays:
        return call
    return _library_call(call, step.library, fallback)


def _library_call(call: KernelCall, choice: LibraryChoice, fallback: bool) -> LibraryCall:
    """The same call, computed by a function of a library."""
    function = LIBRARY_FUNCTIONS[choice.function]
    return LibraryCall(
        kernel=call.kernel,
        args=call.args,
        stream=call.stream,
        predicted_us=call.predicted_us,
        cost=call.cost,
        package=function.package,
        versions=function.versions,
        function=choice.function,
        workspace_bytes=choice.workspace_bytes,
        prepare=function.prepare,
        capturable=function.capturable,
        fallback=fallback,
    )
