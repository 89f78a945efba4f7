"""What runs a step: the reference bodies in PyTorch, or the kernels of a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from tokenspeed_plan.plans.bundle import CUBIN
from tokenspeed_plan.plans.fp8_format import FP8_ROWS
from tokenspeed_plan.plans.schema import (
    Call,
    CollectiveCall,
    KernelSpec,
    LibraryCall,
    Part,
    Plan,
    Program,
    Step,
)
from tokenspeed_plan.plans.types import TensorSpec
from tokenspeed_plan.runtime.execution.arenas import TORCH_DTYPES
from tokenspeed_plan.runtime.execution.block_scaled import dequantise
from tokenspeed_plan.runtime.execution.collectives import Collectives
from tokenspeed_plan.runtime.execution.kernels import Kernels, Launcher, Launches
from tokenspeed_plan.runtime.execution.peer_arenas import PeerMemory
from tokenspeed_plan.runtime.reference import REFERENCE_BODIES, Body

BackendName = Literal["reference", "kernels", "compare"]


class Instruction(NamedTuple):
    """One call of a body.

    A reference kernel has several parts, whose intermediate values live in the numbered slots of a
    list. An operand is a tensor, or the number of such a slot. An output is the number of its slot
    and the planned tensor to copy it to; None where it stays inside the kernel.
    """

    body: Body
    attrs: Mapping[str, Any]
    operands: tuple[Tensor | int, ...]
    outputs: tuple[tuple[int, Tensor | None], ...]


class _BoundPart(NamedTuple):
    """A part of a kernel, before it has tensors: what all calls of the kernel share.

    An operand is the number of a tensor of the kernel, or `~slot`. An output is a slot, and the
    number of the tensor to copy it to.
    """

    body: Body
    attrs: Mapping[str, Any]
    operands: tuple[int, ...]
    outputs: tuple[tuple[int, int | None], ...]

    def instruction(self, tensors: Sequence[Tensor]) -> Instruction:
        """The part on the tensors of a call."""
        operands = tuple([tensors[x] if x >= 0 else ~x for x in self.operands])
        outputs = [(slot, None if x is None else tensors[x]) for slot, x in self.outputs]
        return Instruction(self.body, self.attrs, operands, tuple(outputs))


BoundStep = tuple[Step, list[Instruction]]
LibraryKey = tuple[str, str]  # a kernel, and the function that computes it


def execute(instructions: Iterable[Instruction], num_slots: int) -> None:
    """Run instructions in order; `num_slots` is the most values that one kernel computes."""
    slots: list[Any] = [None] * num_slots
    for body, attrs, operands, outputs in instructions:
        results = body(attrs, *[slots[x] if isinstance(x, int) else x for x in operands])
        for (slot, target), result in zip(outputs, results, strict=True):
            if target is None:
                slots[slot] = result
            else:
                target.copy_(result)


def num_outputs(kernel: KernelSpec) -> int:
    """The values that the parts of a kernel compute."""
    return sum(len(part.outputs) for part in kernel.parts)


class Backend(Protocol):
    """Binds the steps of a program to tensors."""

    @property
    def full_size(self) -> bool:
        """Whether tensors are bound at a program's full size, once for all batches."""

    def bind(
        self,
        program: Program,
        operands: Sequence[tuple[Tensor, ...]],
        num_tokens: int,
        num_seqs: int,
    ) -> Iterator[BoundStep]:
        """Each step with its instructions; `operands` has the tensors of each step."""

    def without_overlap(self) -> Backend:
        """The same, with kernels that do not start before their predecessor has ended."""


class ReferenceBackend:
    """Every kernel as the reference bodies of its parts, one after the other."""

    full_size = False

    def __init__(self, plan: Plan, rank: int = 0, collectives: Collectives | None = None) -> None:
        self.rank = rank
        self.collectives = collectives
        self._kernels = {kernel.name: kernel for kernel in plan.kernels}
        self._dtype = TORCH_DTYPES[plan.model.dtype]
        self._parts: dict[str, list[_BoundPart]] = {}  # of each kernel, whose name has its digest

    def bind(
        self,
        program: Program,
        operands: Sequence[tuple[Tensor, ...]],
        num_tokens: int,
        num_seqs: int,
    ) -> Iterator[BoundStep]:
        """Each step with its instructions."""
        for step, tensors in zip(program.steps, operands, strict=True):
            yield step, self.bind_step(step, tensors)

    def without_overlap(self) -> ReferenceBackend:
        """Reference bodies never overlap."""
        return self

    def bind_step(self, step: Step, tensors: tuple[Tensor, ...]) -> list[Instruction]:
        """One step; an event has no instruction, as everything runs in order."""
        if isinstance(step, Call):
            return self.bind_kernel(self._kernels[step.kernel], tensors)
        if isinstance(step, CollectiveCall):
            return [Instruction(self._collective(step.op), {}, tensors, ())]
        return []

    def bind_kernel(self, kernel: KernelSpec, tensors: tuple[Tensor, ...]) -> list[Instruction]:
        """The instructions of a kernel's parts; `tensors` are in the order of its parameters."""
        parts = self._parts.get(kernel.name)
        if parts is None:
            parts = self._parts[kernel.name] = list(self._bind_parts(kernel))
        return [part.instruction(tensors) for part in parts]

    def _bind_parts(self, kernel: KernelSpec) -> Iterator[_BoundPart]:
        """The parts of a kernel with their bodies."""
        params = {param.name: index for index, param in enumerate(kernel.tensors)}
        specs = {param.name: param.tensor for param in kernel.tensors if param.tensor.format.block}
        slots: dict[str, int] = {}
        for part in kernel.parts:
            operands = tuple(
                params[name] if name in params else ~slots[name] for name in part.operands
            )
            for name in part.outputs:
                slots.setdefault(name, len(slots))
            outputs = tuple((slots[name], params.get(name)) for name in part.outputs)
            body, attrs = self._body(part.kind), self._attrs(part)
            scaled = {
                index: specs[name] for index, name in enumerate(part.operands) if name in specs
            }
            if scaled:
                body = _dequantising(body, scaled, self._dtype)
            yield _BoundPart(body, attrs, operands, outputs)

    def _attrs(self, part: Part) -> dict[str, Any]:
        attrs_of_rank = {name: value.at(self.rank) for name, value in part.rank_attrs.items()}
        return {**part.attrs, **attrs_of_rank}

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


def _dequantising(body: Body, scaled: Mapping[int, TensorSpec], dtype: torch.dtype) -> Body:
    """A body whose block-scaled operands are made plain tensors of `dtype` before each call.

    Where activations are among them they are of fp32, as the tensor cores multiply what is stored.
    """
    if any(spec.format == FP8_ROWS for spec in scaled.values()):
        dtype = torch.float32

    def call(attrs: Mapping[str, Any], *operands: Tensor) -> tuple[Tensor, ...]:
        plain = list(operands)
        for index, spec in scaled.items():
            plain[index] = dequantise(operands[index], spec, dtype)
        return body(attrs, *plain)

    return call


class KernelBackend:
    """Runs each step as a library or as its kernel, where there is one, else as its references.

    Args:
        plan: whose kernels are called.
        kernels: from Triton or from cubins.
        reference: for what is no kernel; it also says the rank.
        full_size: bind tensors at a program's full size. Kernels take addresses only, so that a
            new batch size needs no new tensors. Every step must then have a kernel.
        peers: the memory of the other ranks; without it, kernels that push to them run as their
            references, in which the library adds up.
        libraries: the functions of libraries that run in the place of kernels.
    """

    def __init__(
        self,
        plan: Plan,
        kernels: Kernels,
        reference: ReferenceBackend,
        full_size: bool = False,
        peers: PeerMemory | None = None,
        libraries: Mapping[LibraryKey, Launcher] | None = None,
    ) -> None:
        self.kernels = kernels
        self.reference = reference
        self.full_size = full_size
        self.peers = peers
        self.libraries = libraries or {}
        self._plan = plan
        self._specs = {kernel.name: kernel for kernel in plan.kernels}

    def bind(
        self,
        program: Program,
        operands: Sequence[tuple[Tensor, ...]],
        num_tokens: int,
        num_seqs: int,
    ) -> Iterator[BoundStep]:
        """Each step with its instructions; calls of one kernel share a launcher."""
        launchers: dict[str, Launcher] = {}
        index = self._plan.pool.index_of(program)
        for step, tensors in zip(program.steps, operands, strict=True):
            library = self.library_of(step)
            if library is not None:
                yield step, [Instruction(library, {}, tensors, ())]
                continue
            kernel = self.kernel_of(step)
            if kernel is None:
                yield step, self.reference.bind_step(step, tensors)
                continue
            if kernel.name not in launchers:
                launchers[kernel.name] = self.launcher(kernel, num_tokens, num_seqs, index)
            yield step, [Instruction(launchers[kernel.name], {}, tensors, ())]

    def launches(self, program: Program) -> Launches:
        """The launches of a program, of which none is bound yet."""
        index = self._plan.pool.index_of(program)
        return self.kernels.launches(self.reference.rank, self.peers, index)

    def bind_launch(
        self, step: Step, tensors: tuple[Tensor, ...], launches: Launches
    ) -> list[Instruction]:
        """A step whose kernel is bound to these tensors once, for batches of any size."""
        library = self.library_of(step)
        if library is not None:
            return [Instruction(library, {}, tensors, ())]
        kernel = self.kernel_of(step)
        if kernel is None:
            return self.reference.bind_step(step, tensors)
        return [Instruction(launches.bind(kernel, tensors), {}, (), ())]

    def takes_batch(self, step: Step) -> bool:
        """Whether a step has tensors as large as the batch: what libraries and references do."""
        if self.library_of(step) is not None:
            return True
        return isinstance(step, CollectiveCall) or self._lacks_peers(step)

    def _lacks_peers(self, step: Step) -> bool:
        """Whether a kernel would push to ranks whose memory cannot be written here."""
        if self.peers is not None or not isinstance(step, Call):
            return False
        return self._specs[step.kernel].reduced_operand is not None

    def without_overlap(self) -> KernelBackend:
        """The same kernels; none of them starts before its predecessor has ended."""
        return KernelBackend(
            self._plan,
            self.kernels.without_overlap(),
            self.reference,
            self.full_size,
            self.peers,
            self.libraries,
        )

    def library_of(self, step: Step | Call) -> Launcher | None:
        """The function of a library that runs a step; None where its kernel does."""
        if not isinstance(step, LibraryCall):
            return None
        return self.libraries.get((step.kernel, step.function))

    def kernel_of(self, step: Step) -> KernelSpec | None:
        """The kernel that runs a step; None where the references do."""
        if not isinstance(step, Call) or self._lacks_peers(step):
            return None
        kernel = self._specs[step.kernel]
        has_kernel = self.kernels.has(kernel)
        assert has_kernel or not self.full_size, f"no binary of `{kernel.name}`"
        return kernel if has_kernel else None

    def launcher(
        self, kernel: KernelSpec, num_tokens: int, num_seqs: int, program: int
    ) -> Launcher:
        """A function of the kernel's tensors on this rank, in the program of that index."""
        rank = self.reference.rank
        return self.kernels.launcher(kernel, rank, num_tokens, num_seqs, self.peers, program)


def load_kernels(plan: Plan, bundle: Path) -> Kernels:
    """The binaries of a bundle, or else its sources, which Triton compiles or interprets.

    Raises:
        PlanError: a file is missing or was altered, or what they need is not installed.
    """
    if plan.binaries and (bundle / CUBIN).is_dir():
        from tokenspeed_plan.runtime.execution.cuda_kernels import CudaKernels

        return CudaKernels.load(plan, bundle)
    from tokenspeed_plan.runtime.execution.triton_kernels import TritonKernels

    return TritonKernels.load(plan, bundle)
