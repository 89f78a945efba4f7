"""Memory that peers write: what a kernel with an all-reduce takes, and who may still use a slot."""

from __future__ import annotations

from collections.abc import Mapping

from tokenspeed_plan.plans.kernel_abi import num_ranks
from tokenspeed_plan.plans.ops import ShapeError
from tokenspeed_plan.plans.peer_hazards import PushCall, check_pushes
from tokenspeed_plan.plans.peer_memory import (
    MAX_PUSH_PROGRAMS,
    PEER_COUNTS,
    PEER_SIGNALS,
    PEER_SLOTS,
    peer_params,
)
from tokenspeed_plan.plans.schema import BufferSpec, Call, KernelSpec, Pool, Program
from tokenspeed_plan.plans.types import DTYPE_BITS
from tokenspeed_plan.plans.validate.refusal import refuse


def check_peers(
    program: Program,
    step: Call,
    kernel: KernelSpec,
    buffers: Mapping[str, BufferSpec],
    ranks: int,
) -> None:
    """A kernel that adds up ranks has slots, counts and signals in the symmetric arena.

    Args:
        program: whose step it is.
        step: the call.
        kernel: what it calls.
        buffers: by name, what the step can use.
        ranks: of the plan.

    Raises:
        PlanError: something is missing, lies elsewhere, or is for another number of ranks.
    """
    given = [param for param in kernel.tensors if param.role == "symmetric"]
    if kernel.reduced_operand is None:
        if given:
            raise refuse(f"kernel `{kernel.name}` adds up no ranks, and has peer memory")
        return
    added = num_ranks(kernel)
    if added != ranks:
        raise refuse(f"kernel `{kernel.name}` adds up {added} ranks, the plan has {ranks}")
    if kernel.launch is None:  # the reference computes a collective, and writes to no peer
        return
    names = [param.name for param in given]
    wanted = [param.name for param in peer_params(kernel, ranks)]
    if names != wanted:
        raise refuse(f"kernel `{kernel.name}` has not the peer memory {', '.join(wanted)}")
    places = step.places(kernel)
    for name in names:
        buffer = buffers.get(places[name])
        if buffer is None or buffer.arena != "symmetric":
            raise refuse(f"peers write `{places[name]}`, which is not in the symmetric arena")
    _check_slots(kernel, ranks)
    _check_programs(program, kernel)


def _check_slots(kernel: KernelSpec, ranks: int) -> None:
    """In the kernel's text, slots of other generations, ranks and rows have no byte in common."""
    assert kernel.launch is not None
    by_name = {param.name: param.tensor for param in kernel.tensors}
    (wanted, *_) = peer_params(kernel, ranks)
    rows, generations, *rest = by_name[PEER_SLOTS].shape
    least = (wanted.tensor.shape[0], *wanted.tensor.shape[2:])
    if (rows, *rest) != least:
        raise refuse(f"the slots of `{kernel.name}` are [{rows}, {rest}], it needs {list(least)}")
    assert kernel.reduced_operand is not None
    bits = DTYPE_BITS[by_name[kernel.reduced_operand].dtype]
    words = int(rest[-1])
    slot = words * 32 // bits
    assert isinstance(generations, int)
    baked = {
        "GENERATIONS": generations,
        "WORLD": ranks,
        "SLOT": slot,
        "ROW": generations * ranks * slot,
    }
    constants = kernel.launch.constants
    for name, value in baked.items():
        if constants.get(name) != value:
            raise refuse(f"`{kernel.name}` has {name} {constants.get(name)}, its slots {value}")
    for name in (PEER_COUNTS, PEER_SIGNALS):
        known = {param.name: param.tensor for param in peer_params(kernel, ranks)}
        if by_name[name] != known[name]:
            raise refuse(f"`{name}` of `{kernel.name}` is {list(by_name[name].shape)}")


def _check_programs(program: Program, kernel: KernelSpec) -> None:
    """All programs of a launch run at once: each waits for its peers."""
    assert kernel.launch is not None
    count = 1
    for dim in kernel.launch.grid:
        count *= dim.at(program.max_tokens, program.max_seqs)
    if count > MAX_PUSH_PROGRAMS:
        raise refuse(
            f"`{kernel.name}` has {count} programs that wait for peers, at most "
            f"{MAX_PUSH_PROGRAMS} run at once"
        )


def check_peer_order(pool: Pool, kernels: Mapping[str, KernelSpec], ranks: int) -> None:
    """No rank overwrites what another one still reads, from program to program in any order.

    Raises:
        PlanError: naming the slots.
    """
    sequences: list[list[PushCall]] = []
    for program in pool.programs:
        calls = _pushes(program, kernels)
        sequences += [calls, [call for call in calls if call.rows == "num_tokens"]]
    for sequence in (*sequences, *_joined(sequences)):
        try:
            check_pushes(sequence, ranks)
        except ShapeError as error:
            raise refuse(f"ranks race: {error}") from error


def _joined(sequences: list[list[PushCall]]) -> list[list[PushCall]]:
    """All of them one after the other, forth and back."""
    forth = [call for sequence in sequences for call in sequence]
    back = [call for sequence in reversed(sequences) for call in sequence]
    return [forth, back]


def _pushes(program: Program, kernels: Mapping[str, KernelSpec]) -> list[PushCall]:
    calls: list[PushCall] = []
    for step in program.steps:
        if not isinstance(step, Call):
            continue
        kernel = kernels[step.kernel]
        if kernel.reduced_operand is None or kernel.launch is None:
            continue
        places = step.places(kernel)
        specs = {param.name: param.tensor for param in kernel.tensors}
        rows, generations = specs[kernel.reduced_operand].shape[0], specs[PEER_SLOTS].shape[1]
        calls.append(PushCall(places[PEER_SLOTS], places[PEER_COUNTS], int(generations), str(rows)))
    return calls
