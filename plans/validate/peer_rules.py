"""Memory that peers read: a tensor that ranks add up, and the flags at which they wait."""

from __future__ import annotations

from collections.abc import Mapping

from tokenspeed_plan.plans.kernel_abi import num_ranks
from tokenspeed_plan.plans.schema import SIGNALS, BufferSpec, KernelCall, KernelSpec, Program
from tokenspeed_plan.plans.types import DTYPE_BITS
from tokenspeed_plan.plans.validate.refusal import refuse

_BARRIERS = 2  # a row: one before its parts are read, one after


def check_peers(
    program: Program,
    step: KernelCall,
    kernel: KernelSpec,
    buffers: Mapping[str, BufferSpec],
    ranks: int,
) -> None:
    """A kernel that reads peers finds their tensor and its flags in the symmetric arena.

    Args:
        program: whose step it is.
        step: the call.
        kernel: what it calls.
        buffers: by name, what the step can use.
        ranks: of the plan.

    Raises:
        PlanError: they lie elsewhere, or the kernel is for another number of ranks.
    """
    if kernel.reduced_operand is None:
        return
    if num_ranks(kernel) != ranks:
        raise refuse(f"kernel `{kernel.name}` adds up {num_ranks(kernel)} ranks, of {ranks}")
    if kernel.launch is None:  # the reference computes a collective, and reads no peer
        return
    name = step.places(kernel)[kernel.reduced_operand]
    if name not in buffers or buffers[name].arena != "symmetric":
        raise refuse(f"peers read `{name}` of `{kernel.name}`, which is not in the symmetric arena")
    _check_signals(program, kernel, buffers, name)


def _check_signals(
    program: Program, kernel: KernelSpec, buffers: Mapping[str, BufferSpec], reduced: str
) -> None:
    """Two flags for each row of the reduced tensor and each rank."""
    signals = buffers.get(SIGNALS)
    if signals is None or signals.arena != "symmetric" or signals.tensor.dtype != "i32":
        raise refuse(f"`{kernel.name}` has no i32 `{SIGNALS}` in the symmetric arena")
    sizes = (program.max_tokens, program.max_seqs)
    rows = buffers[reduced].tensor.bind(*sizes)[0]
    needed = rows * _BARRIERS * num_ranks(kernel) * DTYPE_BITS["i32"] // 8
    held = signals.tensor.size_bytes(*sizes)
    if held < needed:
        raise refuse(f"`{SIGNALS}` has {held} bytes, `{kernel.name}` needs {needed}")
