"""Kernels: their names, their launch, and the shapes of their operators; and their binaries."""

from __future__ import annotations

from collections.abc import Mapping

from tokenspeed_plan.plans.canon import kernel_name
from tokenspeed_plan.plans.kernel_abi import launch_params
from tokenspeed_plan.plans.kernel_file import kind_of
from tokenspeed_plan.plans.ops import OPS, Access, OpDef, ShapeError, check_numbers
from tokenspeed_plan.plans.schema import KernelSpec, Limits, Part, Plan, Pool
from tokenspeed_plan.plans.types import Dim, TensorSpec
from tokenspeed_plan.plans.validate.refusal import refuse, require_unique


def check_kernels(plan: Plan, pool: Pool) -> None:
    """Each kernel has its own digest, and parts that fit its tensors and the limits.

    Raises:
        PlanError: naming the kernel.
    """
    for kernel in plan.kernels:
        if kernel.name != kernel_name(kind_of(kernel), kernel):
            raise refuse(f"kernel `{kernel.name}` does not match its digest")
        require_unique("parameter", (param.name for param in kernel.params))
        _check_launch_params(kernel)
        _check_pages(kernel, pool.limits)
        try:
            _check_body(kernel)
        except ShapeError as error:
            raise refuse(f"kernel `{kernel.name}`: {error}") from error
        _check_prefetch(kernel)
        _check_kept_inputs(kernel, pool.limits)
        _check_in_place(kernel, pool.limits)


def check_binaries(plan: Plan) -> None:
    """There is one binary for each kernel with a launch, or none at all.

    Raises:
        PlanError: a kernel or a binary is alone, or a binary is for another GPU.
    """
    require_unique("binary", (binary.kernel for binary in plan.binaries))
    if not plan.binaries:
        return
    launched = [kernel for kernel in plan.kernels if kernel.launch is not None]
    built = {kernel.name for kernel in launched}
    alone = built.symmetric_difference(binary.kernel for binary in plan.binaries)
    if alone:
        raise refuse(f"there is no pair of kernel and binary called `{min(alone)}`")
    for binary in plan.binaries:
        if binary.sm != plan.target.sm:
            raise refuse(
                f"the binary of `{binary.kernel}` is for sm_{binary.sm},"
                f" the plan for sm_{plan.target.sm}"
            )


def _check_launch_params(kernel: KernelSpec) -> None:
    """Tensors come first, then exactly what a launch of these parts takes."""
    wanted = kernel.tensors
    if kernel.launch is not None:
        wanted += launch_params(kernel)
    if kernel.params != wanted:
        names = ", ".join(param.name for param in wanted)
        raise refuse(f"kernel `{kernel.name}` has other parameters than {names}")


def _check_pages(kernel: KernelSpec, limits: Limits) -> None:
    for part in kernel.parts:
        size = part.attrs.get("page_size", limits.page_size)
        if size != limits.page_size:
            raise refuse(
                f"kernel `{kernel.name}` has pages of {size}, the limits of {limits.page_size}"
            )


def _check_prefetch(kernel: KernelSpec) -> None:
    """What is prefetched is an input, and only kernels that overlap prefetch."""
    launch = kernel.launch
    if launch is None:
        return
    inputs = {param.name for param in kernel.params if param.role == "input"}
    if not inputs.issuperset(launch.prefetch):
        raise refuse(f"kernel `{kernel.name}` prefetches what is no input of it")
    overlaps = bool(launch.prefetch) or launch.trigger_after_wait
    if overlaps and not launch.pdl:
        raise refuse(f"kernel `{kernel.name}` does not overlap")


def _check_kept_inputs(kernel: KernelSpec, limits: Limits) -> None:
    for part in kernel.parts:
        kept = _kept_inputs(kernel, part)
        needed = limits.kept_inputs
        if kept is not None and kept != needed:
            raise refuse(f"kernel `{kernel.name}` does not keep {needed} inputs")


def _check_in_place(kernel: KernelSpec, limits: Limits) -> None:
    """Where a step writes the state slot that it reads, nobody reads what another one writes.

    The programs of a kernel share a window of inputs, so that must be a ring; each matrix of a
    state belongs to one of them. Where there are two slots, the next step finds them exchanged.
    """
    slots = f"its plan has {limits.state_slots_per_seq} state slots a sequence"
    for part in kernel.parts:
        if part.kind == "causal_conv" and limits.in_place:
            raise refuse(f"kernel `{kernel.name}` shifts its inputs, {slots}")
        if part.kind == "ring_conv" and not limits.in_place:
            raise refuse(f"kernel `{kernel.name}` has a ring of inputs, {slots}")
        if part.kind == "advance" and part.attrs.get("in_place", False) is not limits.in_place:
            raise refuse(f"kernel `{kernel.name}` exchanges other state slots, {slots}")


def _kept_inputs(kernel: KernelSpec, part: Part) -> Dim | None:
    """Inputs that a decode step keeps, 0 where it writes states instead; else None."""
    if part.kind == "recompute_state":
        index = OPS["recompute_state"].operands.index("kept_inputs")
        shapes = {param.name: param.tensor.shape for param in kernel.params}
        return shapes[part.operands[index]][1]
    if part.attrs.get("mode") in ("update", "recurrent"):
        return 0
    return None


def _check_body(kernel: KernelSpec) -> None:
    """The parts, one after the other, make the outputs from the other tensors."""
    known: dict[str, TensorSpec] = {}
    for param in kernel.tensors:
        if param.role != "output":
            known[param.name] = param.tensor
    for part in kernel.parts:
        known |= _part_outputs(kernel, part, known)
    for param in kernel.tensors:
        if known.get(param.name) != param.tensor:
            raise refuse(f"kernel `{kernel.name}`: output `{param.name}`")


def _part_outputs(
    kernel: KernelSpec, part: Part, known: Mapping[str, TensorSpec]
) -> dict[str, TensorSpec]:
    op = _operator(kernel, part)
    for name in part.operands:
        if name not in known:
            raise refuse(f"kernel `{kernel.name}` reads `{name}` before it is made")
    _check_states(kernel, part, op)
    check_numbers(part.attrs)
    operands = [known[name] for name in part.operands]
    by_role = dict(zip(op.operands, operands, strict=True))
    specs = op.infer(part.attrs, by_role)
    outputs = part.outputs
    is_new = known.keys().isdisjoint(outputs)
    if not is_new or len(outputs) != len(specs):
        raise refuse(f"kernel `{kernel.name}`: outputs of `{part.kind}`")
    return dict(zip(outputs, specs.values(), strict=True))


def check_operators(plan: Plan) -> None:
    """All parts of kernels are operators that exist, with their operands and constants.

    Raises:
        PlanError: one is not. Other rules look operators up.
    """
    for kernel in plan.kernels:
        for part in kernel.parts:
            _operator(kernel, part)


def _operator(kernel: KernelSpec, part: Part) -> OpDef:
    op = OPS.get(part.kind)
    if op is None:
        raise refuse(f"kernel `{kernel.name}` has unknown operator `{part.kind}`")
    constants = set(part.attrs).difference(op.optional)
    complete = constants == set(op.attrs)
    fits = len(part.operands) == len(op.operands)
    if not complete or not fits:
        raise refuse(f"kernel `{kernel.name}`: `{part.kind}` has the wrong operands or constants")
    return op


def _check_states(kernel: KernelSpec, part: Part, op: OpDef) -> None:
    granted: dict[str, Access] = {}
    for param in kernel.params:
        if param.role == "state":
            granted[param.name] = param.access
    states = states_of(part)
    for name, (_, access) in zip(states, op.states, strict=True):
        if granted.get(name) != access:
            raise refuse(f"kernel `{kernel.name}`: the access to state `{name}` is not {access}")


def states_of(part: Part) -> tuple[str, ...]:
    """The states of an operator are its last operands."""
    num_states = len(OPS[part.kind].states)
    first = len(part.operands) - num_states
    return part.operands[first:]
