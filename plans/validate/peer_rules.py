"""Memory that peers read: a tensor that ranks add up, and the flags at which they wait."""

from __future__ import annotations

from collections.abc import Mapping

from tokenspeed_plan.plans.kernel_abi import num_ranks
from tokenspeed_plan.plans.schema import SIGNALS, BufferSpec, KernelCall, KernelSpec, Program
from tokenspeed_plan.plans.types import DTYPE_BITS
from tokenspeed_plan.plans.validate.refusal import refuse

_BARRIERS = 2  # for each row: one before peers read it, one after


def check_peers(
    program: Program,
    step: KernelCall,
    kernel: KernelSpec,
    buffers: Mapping[str, BufferSpec],
    ranks: int,
) -> None:
    """The tensor that a kernel reads from its peers, and its flags, lie in the symmetric arena.

    Args:
        program: whose step it is.
        step: the call.
        kernel: what it calls.
        buffers: by name, what the step can use.
        ranks: of the plan.

    Raises:
        PlanError: they lie elsewhere, or the kernel is for another number of ranks.
    """
    reduced = kernel.reduced_operand
    if reduced is None:
        return
    added = num_ranks(kernel)
    if added != ranks:
        raise refuse(f"kernel `{kernel.name}` adds up {added} ranks, the plan has {ranks}")
    if kernel.launch is None:  # the reference computes a collective, and reads no peer
        return
    places = step.places(kernel)
    name = places[reduced]
    buffer = buffers.get(name)
    if buffer is None or buffer.arena != "symmetric":
        raise refuse(f"peers read `{name}` of `{kernel.name}`, which is not in the symmetric arena")
    _check_signals(program, kernel, buffers.get(SIGNALS), buffer)


def _check_signals(
    program: Program, kernel: KernelSpec, signals: BufferSpec | None, reduced: BufferSpec
) -> None:
    """Two flags for each row of the reduced tensor and each rank."""
    if signals is None or signals.arena != "symmetric" or signals.tensor.dtype != "i32":
        raise refuse(f"`{kernel.name}` has no i32 `{SIGNALS}` in the symmetric arena")
    sizes = (program.max_tokens, program.max_seqs)
    rows, *_ = reduced.tensor.bind(*sizes)
    flags = rows * _BARRIERS * num_ranks(kernel)
    flag_bytes = DTYPE_BITS["i32"] // 8
    needed = flags * flag_bytes
    held = signals.tensor.size_bytes(*sizes)
    if held < needed:
        raise refuse(f"`{SIGNALS}` has {held} bytes, `{kernel.name}` needs {needed}")
