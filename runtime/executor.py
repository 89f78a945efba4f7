"""Replay: the steps of a program, bound to tensors once, then run in a loop that looks nothing up.

Kernels run as their reference bodies. What a kernel keeps to itself stays in a slot of a small list, what it gives
back is copied to the planned place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from tokenspeed_plan.plans.schema import BufferSpec, CollectiveCall, KernelCall, KernelSpec, Part, Plan, Program
from tokenspeed_plan.runtime.memory import Arenas
from tokenspeed_plan.runtime.reference import BODIES, Body
from torch import Tensor

MAX_BINDINGS = 64  # distinct (program, tokens, sequences) kept bound

# body, constants, operands (a tensor, or the slot of a value inside the kernel), outputs (slot, planned place)
Instruction = tuple[Body, Mapping[str, Any], tuple[Tensor | int, ...], tuple[tuple[int, Tensor | None], ...]]


class Collectives(Protocol):
    """What joins the ranks."""

    def all_reduce(self, source: Tensor, target: Tensor) -> None:
        """target = sum of source over the ranks."""

    def all_gather(self, source: Tensor, target: Tensor) -> None:
        """target = the columns of all ranks side by side."""


class Executor:
    """The programs of a plan on one rank."""

    def __init__(
        self,
        plan: Plan,
        arenas: Arenas,
        weights: Mapping[str, Tensor],
        rank: int = 0,
        collectives: Collectives | None = None,
    ) -> None:
        self.plan = plan
        self.rank = rank
        self._arenas = arenas
        self._weights = weights
        self._collectives = collectives
        self._kernels = {kernel.name: kernel for kernel in plan.kernels}
        self._shared = {buffer.name: buffer for buffer in plan.buffers}
        most = max(sum(len(part.outputs) for part in kernel.parts) for kernel in plan.kernels)
        self._temps = [torch.empty(0)] * most
        self._bound: dict[tuple[str, int, int, int], tuple[Instruction, ...]] = {}

    def buffer(self, name: str, num_tokens: int, num_seqs: int) -> Tensor:
        """A state or io buffer, at the size of a batch."""
        return self._view(self._shared[name], num_tokens, num_seqs)

    @torch.inference_mode()
    def run(self, program: Program, num_tokens: int, num_seqs: int) -> None:
        """One replay; inputs and outputs are in the io buffers."""
        temps = list(self._temps)
        for body, attrs, operands, outputs in self._bind(program, num_tokens, num_seqs):
            results = body(attrs, *[temps[x] if isinstance(x, int) else x for x in operands])
            for (slot, place), result in zip(outputs, results, strict=True):
                if place is None:
                    temps[slot] = result
                else:
                    place.copy_(result)

    def _bind(self, program: Program, num_tokens: int, num_seqs: int) -> tuple[Instruction, ...]:
        key = (program.phase, program.bucket, num_tokens, num_seqs)
        if key not in self._bound:
            if len(self._bound) >= MAX_BINDINGS:
                self._bound.clear()
            self._bound[key] = tuple(self._instructions(program, num_tokens, num_seqs))
        return self._bound[key]

    def _instructions(self, program: Program, num_tokens: int, num_seqs: int) -> list[Instruction]:
        local = {buffer.name: buffer for buffer in program.buffers}

        def tensor(name: str) -> Tensor:
            if name in self._weights:
                return self._weights[name]
            return self._view(local.get(name) or self._shared[name], num_tokens, num_seqs)

        made: list[Instruction] = []
        for step in program.steps:
            if isinstance(step, KernelCall):
                kernel = self._kernels[step.kernel]
                places = {p.name: tensor(name) for p, name in zip(kernel.params, step.args, strict=True)}
                made += self._kernel(kernel, places)
            elif isinstance(step, CollectiveCall):
                made.append((self._collective(step.op), {}, (tensor(step.source), tensor(step.target)), ()))
        return made

    def _kernel(self, kernel: KernelSpec, places: Mapping[str, Tensor]) -> list[Instruction]:
        slots: dict[str, int] = {}
        made: list[Instruction] = []
        for part in kernel.parts:
            operands = tuple(places[name] if name in places else slots[name] for name in part.operands)
            for name in part.outputs:
                slots.setdefault(name, len(slots))
            outputs = tuple((slots[name], places.get(name)) for name in part.outputs)
            made.append((BODIES[part.kind], self._attrs(part), operands, outputs))
        return made

    def _attrs(self, part: Part) -> dict[str, Any]:
        return {**part.attrs, **{name: shift.at(self.rank) for name, shift in part.rank_attrs.items()}}

    def _collective(self, op: str) -> Body:
        assert self._collectives is not None, "the loader refuses a plan of several ranks without collectives"
        call: Callable[[Tensor, Tensor], None] = getattr(self._collectives, op)

        def body(attrs: Mapping[str, Any], source: Tensor, target: Tensor) -> tuple[()]:
            call(source, target)
            return ()

        return body

    def _view(self, buffer: BufferSpec, num_tokens: int, num_seqs: int) -> Tensor:
        shape = buffer.tensor.bind(num_tokens, num_seqs)
        return self._arenas.view(buffer.arena, buffer.offset_bytes, shape, buffer.tensor.dtype)
