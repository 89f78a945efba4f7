"""Replay: the steps of a program, bound to tensors once, then run in a loop that looks nothing up.

Kernels run as their reference bodies, or as the bundle's Triton kernels. What a reference body
keeps to itself stays in a slot of a small list, what it gives back is copied to the planned place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tokenspeed_plan.plans.schema import (
    BufferSpec,
    CollectiveCall,
    KernelCall,
    KernelSpec,
    Part,
    Plan,
    Program,
    Step,
)
from tokenspeed_plan.runtime.arenas import Arenas
from tokenspeed_plan.runtime.collectives import Collectives
from tokenspeed_plan.runtime.reference import REFERENCE_BODIES, Body
from tokenspeed_plan.runtime.triton_kernels import KernelBackend

MAX_BINDINGS = 64  # distinct (program, tokens, sequences) kept bound

# body, constants, operands (a tensor, or the slot of a value inside the kernel), outputs (slot,
# planned place)
Instruction = tuple[
    Body, Mapping[str, Any], tuple[Tensor | int, ...], tuple[tuple[int, Tensor | None], ...]
]


class Executor:
    """The programs of a plan on one rank. With a `backend`, kernels that have a Triton body run as that."""

    def __init__(
        self,
        plan: Plan,
        arenas: Arenas,
        weights: Mapping[str, Tensor],
        rank: int = 0,
        collectives: Collectives | None = None,
        backend: KernelBackend | None = None,
    ) -> None:
        self.plan = plan
        self.rank = rank
        self.collectives = collectives
        self.backend = backend
        self.kernels = {kernel.name: kernel for kernel in plan.kernels}
        self._arenas = arenas
        self._weights = weights
        self._shared = {buffer.name: buffer for buffer in plan.pool.buffers}
        most = max(sum(len(part.outputs) for part in kernel.parts) for kernel in plan.kernels)
        self._temps = [torch.empty(0)] * most
        self._bound: dict[tuple[str, int, int, int], tuple[Instruction, ...]] = {}

    def buffer(self, name: str, num_tokens: int, num_seqs: int) -> Tensor:
        """A state or io buffer, at the size of a batch."""
        return self._view(self._shared[name], num_tokens, num_seqs)

    def prepare(self) -> None:
        """Whatever can be done before the first replay."""

    def copy_page(self, source: int, target: int) -> int:
        """Copy a page of keys and values in all layers; the bytes that were copied."""
        pages = [
            self._view(buffer, 0, 0)
            for buffer in self._shared.values()
            if buffer.arena == "kv_cache"
        ]
        for view in pages:
            view[target].copy_(view[source], non_blocking=True)
        return sum(view[source].nbytes for view in pages)

    def fetch(self, *values: Tensor) -> Callable[[], tuple[list[int], ...]]:
        """A function that gives each of the values as the last replay left them, once they are there."""
        found: tuple[list[int], ...] = tuple(value.flatten().tolist() for value in values)
        return lambda: found

    @torch.inference_mode()
    def run(self, program: Program, num_tokens: int, num_seqs: int) -> None:
        """One replay; inputs and outputs are in the io buffers."""
        self.execute(self._bind(program, num_tokens, num_seqs))

    def execute(self, instructions: Iterable[Instruction]) -> None:
        """Run instructions in order."""
        temps = list(self._temps)
        for body, attrs, operands, outputs in instructions:
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
            made = self.steps(program, num_tokens, num_seqs)
            self._bound[key] = tuple(instruction for _, step in made for instruction in step)
        return self._bound[key]

    def alone(self) -> Executor:
        """The same, with kernels that do not start while their predecessor ends."""
        backend = self.backend.alone() if self.backend else None
        return Executor(
            self.plan, self._arenas, self._weights, self.rank, self.collectives, backend
        )

    def steps(
        self, program: Program, num_tokens: int, num_seqs: int
    ) -> Iterator[tuple[Step, Iterable[Instruction]]]:
        """Each step of a program with its instructions."""
        places = self.places(program, num_tokens, num_seqs)
        for step in program.steps:
            yield step, self._step(step, self.tensors(step, places), num_tokens, num_seqs)

    def buffer_of(self, program: Program, name: str, num_tokens: int, num_seqs: int) -> Tensor:
        """Any tensor of a program, at the size of a batch."""
        return self.places(program, num_tokens, num_seqs)(name)

    def places(self, program: Program, num_tokens: int, num_seqs: int) -> Callable[[str], Tensor]:
        """A function from a name to its tensor, in a program at the size of a batch."""
        local = {buffer.name: buffer for buffer in program.buffers}

        def tensor(name: str) -> Tensor:
            if name in self._weights:
                return self._weights[name]
            return self._view(local.get(name) or self._shared[name], num_tokens, num_seqs)

        return tensor

    def tensors(self, step: Step, places: Callable[[str], Tensor]) -> tuple[Tensor, ...]:
        """What a step works on, in the order of its arguments."""
        if isinstance(step, KernelCall):
            return tuple(places(name) for name in step.args)
        return (
            (places(step.source), places(step.target)) if isinstance(step, CollectiveCall) else ()
        )

    def _step(
        self, step: Step, tensors: tuple[Tensor, ...], num_tokens: int, num_seqs: int
    ) -> Iterable[Instruction]:
        kernel = self.kernels[step.kernel] if isinstance(step, KernelCall) else None
        if kernel is None or self.backend is None or not self.backend.has(kernel):
            return self.reference(step, tensors)
        launcher = self.backend.launcher(kernel, self.rank, num_tokens, num_seqs, self.collectives)
        return ((launcher, {}, tensors, ()),)

    def reference(self, step: Step, tensors: tuple[Tensor, ...]) -> list[Instruction]:
        """A step as reference bodies; events mean nothing where all runs in order."""
        if isinstance(step, KernelCall):
            return self.reference_kernel(self.kernels[step.kernel], tensors)
        return (
            [(self._collective(step.op), {}, tensors, ())]
            if isinstance(step, CollectiveCall)
            else []
        )

    def reference_kernel(
        self, kernel: KernelSpec, tensors: tuple[Tensor, ...]
    ) -> list[Instruction]:
        """A kernel's parts, one after the other."""
        places = {param.name: view for param, view in zip(kernel.tensors, tensors, strict=True)}
        slots: dict[str, int] = {}
        made: list[Instruction] = []
        for part in kernel.parts:
            operands = tuple(
                places[name] if name in places else slots[name] for name in part.operands
            )
            for name in part.outputs:
                slots.setdefault(name, len(slots))
            outputs = tuple((slots[name], places.get(name)) for name in part.outputs)
            made.append((self._body(part.kind), self._attrs(part), operands, outputs))
        return made

    def _attrs(self, part: Part) -> dict[str, Any]:
        return {
            **part.attrs,
            **{name: shift.at(self.rank) for name, shift in part.rank_attrs.items()},
        }

    def _body(self, kind: str) -> Body:
        if kind != "all_reduce":
            return REFERENCE_BODIES[kind]
        reduce = self._collective(kind)

        def body(attrs: Mapping[str, Any], source: Tensor) -> tuple[Tensor]:
            target = torch.empty_like(source)
            reduce(attrs, source, target)
            return (target,)

        return body

    def _collective(self, op: str) -> Body:
        assert self.collectives is not None, (
            "the loader refuses a plan of several ranks without collectives"
        )
        call: Callable[[Tensor, Tensor], None] = getattr(self.collectives, op)

        def body(attrs: Mapping[str, Any], source: Tensor, target: Tensor) -> tuple[()]:
            call(source, target)
            return ()

        return body

    def _view(self, buffer: BufferSpec, num_tokens: int, num_seqs: int) -> Tensor:
        shape = buffer.tensor.bind(num_tokens, num_seqs)
        return self._arenas.view(buffer.arena, buffer.offset_bytes, shape, buffer.tensor.dtype)
