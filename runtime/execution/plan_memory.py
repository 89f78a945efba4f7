"""The memory of one rank: weights, states and buffers of a plan as views of its arenas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

from torch import Tensor

from tokenspeed_plan.plans.schema import (
    BufferSpec,
    Call,
    CollectiveCall,
    Plan,
    Program,
    Step,
)
from tokenspeed_plan.runtime.execution.arenas import Arenas


class PlanMemory:
    """All tensors of a plan on one rank, found by name.

    Args:
        plan: names the buffers, their arenas and their offsets.
        arenas: the allocations.
        weights: tensors of this rank by name.
    """

    def __init__(self, plan: Plan, arenas: Arenas, weights: Mapping[str, Tensor]) -> None:
        self.plan = plan
        self._arenas = arenas
        self._weights = weights
        self._buffers = {buffer.name: buffer for buffer in plan.pool.buffers}

    def arena(self, name: str) -> Tensor:
        """All bytes of an arena, u8."""
        return self._arenas.whole(name)

    @property
    def paths(self) -> Mapping[str, str]:
        """Files by which other processes map arenas that lie in shared memory, by name."""
        return self._arenas.paths

    def buffer(self, name: str, num_tokens: int = 0, num_seqs: int = 0) -> Tensor:
        """A buffer that all programs share, at the size of a batch; a state has one size."""
        return self._view(self._buffers[name], num_tokens, num_seqs)

    def tensors_of(
        self, program: Program, num_tokens: int, num_seqs: int
    ) -> Callable[[str], Tensor]:
        """A function from a name to its tensor, in a program at the size of a batch.

        Each tensor is made once, though many steps name it.
        """
        own_buffers = {buffer.name: buffer for buffer in program.buffers}

        @cache
        def tensor_of(name: str) -> Tensor:
            if name in self._weights:
                return self._weights[name]
            buffer = own_buffers.get(name) or self._buffers[name]
            return self._view(buffer, num_tokens, num_seqs)

        return tensor_of

    def states(self, arena: str) -> list[Tensor]:
        """The state buffers of an arena (`kv_cache` or `state`), one or more for each layer."""
        states = []
        for buffer in self._buffers.values():
            if buffer.arena == arena:
                states.append(self._view(buffer, 0, 0))
        return states

    def copy_page(self, source: int, target: int) -> int:
        """Copy a page of keys and values in all layers; returns the bytes that were copied."""
        copied_bytes = 0
        for layer in self.states("kv_cache"):
            page = layer[source]
            layer[target].copy_(page, non_blocking=True)
            copied_bytes += page.nbytes
        return copied_bytes

    def _view(self, buffer: BufferSpec, num_tokens: int, num_seqs: int) -> Tensor:
        tensor = buffer.tensor
        shape = tensor.bind(num_tokens, num_seqs)
        if tensor.format.block:  # a flat run of elements and factors
            shape = (tensor.size_bytes(num_tokens, num_seqs),)
        return self._arenas.view(buffer.arena, buffer.offset_bytes, shape, tensor.dtype)


def operands_of(step: Step, tensor_of: Callable[[str], Tensor]) -> tuple[Tensor, ...]:
    """The tensors of a step in the order of its arguments; an event has none."""
    if isinstance(step, Call):
        return tuple(tensor_of(name) for name in step.args)
    if isinstance(step, CollectiveCall):
        return tensor_of(step.source), tensor_of(step.target)
    return ()
