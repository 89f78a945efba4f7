"""Replay with both backends: each step as a kernel and as its reference, on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.schema import KernelCall, KernelSpec, Param, Plan, Program
from tokenspeed_plan.plans.types import DType
from tokenspeed_plan.runtime.execution.backend import (
    BoundStep,
    Instruction,
    KernelBackend,
    execute,
    num_outputs,
)
from tokenspeed_plan.runtime.execution.launch import EagerLaunch
from tokenspeed_plan.runtime.request import SamplingParams

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.engine import Engine

# Largest difference over the largest value of the tensor, by the plan's dtype: sums are taken in
# another order, and a kernel keeps in fp32 what its references round to bf16 in between.
TOLERANCE: dict[DType, float] = {"fp32": 1e-4, "bf16": 3e-2}
NUM_TOKENS = 4  # generated for each prompt
PROMPT_LENGTHS = (70, 3)  # of made-up prompts, where the plan has no canary
MIN_SCALE = 1e-6  # differences of smaller values are not magnified


@dataclass(slots=True)
class Tally:
    """What was compared, and the largest difference."""

    steps: int = 0
    skipped: int = 0
    worst: float = 0.0
    worst_kernel: str = ""


class ComparingBackend:
    """Runs every step twice, refuses the first that differs, and goes on with the kernel's results.

    It reads results on the host, so it is launched eagerly.
    """

    full_size = False

    def __init__(self, plan: Plan, backend: KernelBackend) -> None:
        self.tally = Tally()
        self._plan = plan
        self._backend = backend
        self._tolerance = TOLERANCE[plan.model.dtype]

    def bind(
        self,
        program: Program,
        operands: Sequence[tuple[Tensor, ...]],
        num_tokens: int,
        num_seqs: int,
    ) -> Iterator[BoundStep]:
        """Each step as one instruction that runs both; a step without a kernel as its reference."""
        for index, step in enumerate(program.steps):
            tensors = operands[index]
            kernel = self._backend.kernel_of(step)
            if kernel is None:
                instructions = self._backend.reference.bind_step(step, tensors)
                if isinstance(step, KernelCall):
                    instructions.append(Instruction(self._count_skipped, {}, (), ()))
                yield step, instructions
                continue
            where = f"step {index} of {program.phase}/{program.bucket}, `{kernel.name}`"
            compare = _Comparison(self, where, kernel, num_tokens, num_seqs)
            yield step, [Instruction(compare, {}, tensors, ())]

    def without_overlap(self) -> ComparingBackend:
        """Steps that are compared never overlap."""
        return self

    def run_reference(self, kernel: KernelSpec, tensors: tuple[Tensor, ...]) -> None:
        """A kernel as its reference bodies."""
        instructions = self._backend.reference.bind_kernel(kernel, tensors)
        execute(instructions, num_outputs(kernel))

    def run_kernel(
        self, kernel: KernelSpec, tensors: tuple[Tensor, ...], num_tokens: int, num_seqs: int
    ) -> None:
        """A kernel as itself."""
        launcher = self._backend.launcher(kernel, num_tokens, num_seqs)
        launcher({}, *tensors)

    def judge(self, where: str, kernel: str, got: Tensor, wanted: Tensor) -> None:
        """Note a difference.

        Raises:
            PlanError: it is over the tolerance; integers must be equal.
        """
        error = difference(got, wanted)
        tolerance = self._tolerance if got.is_floating_point() else 0.0
        if not error <= tolerance:
            raise PlanError(
                f"{where}: kernel and reference differ by {error:.2e}",
                "the first such step; report it",
            )
        if error > self.tally.worst:
            self.tally.worst = error
            self.tally.worst_kernel = kernel

    def _count_skipped(self, attrs: object) -> tuple[()]:
        self.tally.skipped += 1
        return ()


@dataclass(frozen=True, slots=True)
class _Comparison:
    """The body of one step that is compared."""

    backend: ComparingBackend
    where: str
    kernel: KernelSpec
    num_tokens: int
    num_seqs: int

    def __call__(self, attrs: object, *tensors: Tensor) -> tuple[()]:
        written = {i: param for i, param in enumerate(self.kernel.tensors) if _is_written(param)}
        wanted = tuple(x.clone() if i in written else x for i, x in enumerate(tensors))
        for param, tensor in zip(self.kernel.tensors, tensors, strict=True):
            if param.role == "output":
                tensor.view(torch.uint8).fill_(0xFF)  # NaN: what the kernel leaves out shows
        self.backend.run_reference(self.kernel, wanted)
        self.backend.run_kernel(self.kernel, tensors, self.num_tokens, self.num_seqs)
        self.backend.tally.steps += 1
        for index, param in written.items():
            where = f"{self.where}, `{param.name}`"
            self.backend.judge(where, self.kernel.name, tensors[index], wanted[index])
        return ()


def _is_written(param: Param) -> bool:
    return param.role in ("output", "state") and param.access != "read"


def difference(got: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest finite value; NaN where what is not finite differs."""
    if not got.is_floating_point():
        return float((got != wanted).sum())
    finite = wanted.isfinite()
    same = torch.allclose(got[~finite], wanted[~finite], rtol=0.0, atol=0.0, equal_nan=True)
    if not same or not got[finite].isfinite().all():
        return float("nan")
    if not finite.any():
        return 0.0
    scale = wanted[finite].abs().max().float().item()
    largest = (got[finite].float() - wanted[finite].float()).abs().max().item()
    return largest / max(scale, MIN_SCALE)


def check_steps(engine: Engine, prompts: Mapping[str, tuple[int, ...]] | None = None) -> Tally:
    """Compare all steps of prefill and a few of decode on the canary's prompts, or on made-up ones.

    Args:
        engine: loaded with the backend `compare`.
        prompts: other prompts, by name.

    Raises:
        PlanError: naming the first step that differs.
    """
    backend = engine.executor.backend
    assert isinstance(backend, ComparingBackend)
    assert isinstance(engine.executor.launch, EagerLaunch)
    backend.tally = Tally()
    chosen = list(prompts.values()) if prompts else _prompts(engine)
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    engine.generate(chosen[: engine.max_seqs], params)
    return backend.tally


def _prompts(engine: Engine) -> list[tuple[int, ...]]:
    """The prompts of the canary; without one, ascending token ids."""
    if engine.plan.canary:
        return [item.prompt_ids for item in engine.plan.canary]
    longest = engine.max_seq_len - NUM_TOKENS
    return [tuple(range(1, 1 + min(length, longest))) for length in PROMPT_LENGTHS]
