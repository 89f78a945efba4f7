"""Programs: the arguments of each step fit, and their order gives what the runtime reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenspeed_plan.plans.hazards import check_hazards
from tokenspeed_plan.plans.libraries import LIBRARY_FUNCTIONS, computes_kernel, is_bounds
from tokenspeed_plan.plans.ops import RECOMPUTED, ShapeError
from tokenspeed_plan.plans.schema import (
    BufferSpec,
    Call,
    CollectiveCall,
    KernelSpec,
    LibraryCall,
    Plan,
    Pool,
    Program,
)
from tokenspeed_plan.plans.types import TensorSpec
from tokenspeed_plan.plans.validate.batch_rules import Producer, check_batch
from tokenspeed_plan.plans.validate.kernel_rules import states_of
from tokenspeed_plan.plans.validate.peer_rules import check_peer_order, check_peers
from tokenspeed_plan.plans.validate.refusal import refuse

_ARENAS_OF_ROLE: dict[str, tuple[str, ...]] = {
    "input": ("io", "activations"),
    "output": ("io", "activations"),
    "state": ("kv_cache", "state", "io"),
    "scratch": ("scratch",),
    "symmetric": ("symmetric",),
}


@dataclass(frozen=True, slots=True)
class _Scope:
    """A program and what its steps can name; `producers` says which operator wrote a buffer."""

    program: Program
    kernels: dict[str, KernelSpec]
    weights: dict[str, TensorSpec]
    buffers: dict[str, BufferSpec]
    num_ranks: int
    sm: int
    producers: dict[str, Producer] = field(default_factory=dict)


def check_programs(plan: Plan, pool: Pool) -> None:
    """Each program computes what its steps say.

    Raises:
        PlanError: naming the program, and the step that does not fit.
    """
    kernels = {kernel.name: kernel for kernel in plan.kernels}
    weights = {weight.name: weight.tensor for weight in pool.weights}
    for program in pool.programs:
        visible = (*pool.buffers, *program.buffers)
        buffers = {buffer.name: buffer for buffer in visible}
        scope = _Scope(program, kernels, weights, buffers, plan.target.count, plan.target.sm)
        _check_outputs(program)
        _check_steps(scope)
        _check_draft_steps(scope)
        _check_recomputed(scope)
        try:
            check_hazards(program, kernels, buffers)
        except ShapeError as error:
            raise refuse(f"program {program.name}: {error}") from error
    check_peer_order(pool, kernels, plan.target.count)


def _check_outputs(program: Program) -> None:
    """What the runtime reads after a run must be an output."""
    promised = {program.logits, program.tokens}
    if program.depth:
        promised.add(program.drafts)
    if program.query_len > 1:
        promised.add("accepted")
    missing = promised - set(program.outputs)
    if missing:
        raise refuse(f"{program.name} does not give `{min(missing)}`")
    if program.captured and program.phase != "decode":
        raise refuse(f"{program.phase} is captured")


def _check_steps(scope: _Scope) -> None:
    for step in scope.program.steps:
        if not 0 <= step.stream < scope.program.num_streams:
            raise refuse(f"there is no stream {step.stream}")
        if isinstance(step, CollectiveCall):
            _check_collective(scope, step)
        if not isinstance(step, Call):
            continue
        kernel = _check_call(scope, step)
        check_batch(scope.program, step, kernel, scope.producers)
        check_peers(scope.program, step, kernel, scope.buffers, scope.num_ranks)
        if isinstance(step, LibraryCall):
            _check_library(scope, step, kernel)


def _check_call(scope: _Scope, step: Call) -> KernelSpec:
    kernel = scope.kernels.get(step.kernel)
    if kernel is None or len(kernel.tensors) != len(step.args):
        program = scope.program.name
        raise refuse(f"a step of {program} does not fit kernel `{step.kernel}`")
    for param, name in zip(kernel.tensors, step.args, strict=True):
        given = _tensor_for_role(scope, name, param.role)
        if given != param.tensor:
            what = f"parameter `{param.name}` of `{step.kernel}`"
            raise refuse(f"`{name}` does not fit {what}")
    return kernel


def _tensor_for_role(scope: _Scope, name: str, role: str) -> TensorSpec | None:
    """The weight or buffer of that name, None where it may not have the role."""
    if role == "weight":
        return scope.weights.get(name)
    buffer = scope.buffers.get(name)
    if buffer is None or buffer.arena not in _ARENAS_OF_ROLE[role]:
        return None
    return buffer.tensor


def _check_collective(scope: _Scope, step: CollectiveCall) -> None:
    """The target holds the result: as large as the source, or that of all ranks side by side."""
    source = scope.buffers.get(step.source)
    target = scope.buffers.get(step.target)
    if source is None or target is None or source is target:
        raise refuse(f"collective from `{step.source}` to `{step.target}`")
    what = f"{step.op} of `{step.source}`"
    *leading, columns = source.tensor.shape
    if scope.num_ranks == 1 or not isinstance(columns, int):
        raise refuse(f"no {what} is possible")
    if step.op == "all_gather":
        columns *= scope.num_ranks
    result = source.tensor.reshaped((*leading, columns))
    if target.tensor != result:
        raise refuse(f"`{step.target}` cannot hold the {what}")


def _check_library(scope: _Scope, step: LibraryCall, kernel: KernelSpec) -> None:
    """The function is known, computes the kernel's parts on this target, and has its workspace."""
    function = LIBRARY_FUNCTIONS.get(step.function)
    what = f"`{step.function}` of `{step.package}`"
    if function is None or function.package != step.package:
        raise refuse(f"{what} is no known function of a library")
    if scope.sm not in function.sms or not computes_kernel(function, kernel):
        raise refuse(f"{what} does not compute `{step.kernel}` on sm_{scope.sm}")
    if scope.program.max_tokens < function.least_tokens:
        raise refuse(f"{what} is for {function.least_tokens} tokens and more")
    if (step.prepare, step.capturable) != (function.prepare, function.capturable):
        raise refuse(f"{what}: prepare {step.prepare}, capturable {step.capturable}")
    if scope.program.captured and not step.capturable:
        raise refuse(f"{what} is in the captured program {scope.program.name}")
    if not is_bounds(step.versions):
        raise refuse(f"{what}: `{step.versions}` are no bounds such as `>=3.0,<3.1`")
    needed = function.workspace_bytes(kernel.parts[0].attrs, scope.program.max_tokens)
    if step.workspace_bytes < needed:
        raise refuse(f"{what} has {step.workspace_bytes} bytes of workspace, it needs {needed}")


def _check_draft_steps(scope: _Scope) -> None:
    """Each pass that drafts a token is one position further than the one before it."""
    program = scope.program
    found = []
    for step in program.steps:
        if not isinstance(step, Call):
            continue
        for part in scope.kernels[step.kernel].parts:
            if part.kind == "draft_place":
                found.append(part.attrs["step"])
    needed = list(range(1, program.depth))
    if sorted(found) != needed:
        raise refuse(f"{program.name} drafts at steps {found} for depth {program.depth}")


def _check_recomputed(scope: _Scope) -> None:
    """A kernel that expects a recomputed state comes after `recompute_state` has written it."""
    written: set[str] = set()
    for step in scope.program.steps:
        if not isinstance(step, Call):
            continue
        kernel = scope.kernels[step.kernel]
        places = step.places(kernel)
        for part in kernel.parts:
            states = {places[name] for name in states_of(part)}
            if part.kind == "recompute_state":
                written |= states
            elif part.attrs.get("mode") == RECOMPUTED and not states <= written:
                name = scope.program.name
                raise refuse(f"{name}: nothing brings the state of `{kernel.name}`")
