"""Runs each step twice on the same inputs: as a kernel, and as its reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.schema import Call, KernelSpec, Param, Plan, Program, Step
from tokenspeed_plan.plans.types import DType
from tokenspeed_plan.runtime.execution.backend import (
    BoundStep,
    Instruction,
    KernelBackend,
    execute,
    num_outputs,
)
from tokenspeed_plan.runtime.execution.block_scaled import dequantise
from tokenspeed_plan.runtime.execution.kernels import Launcher, prepare_batch
from tokenspeed_plan.runtime.execution.launch import EagerLaunch
from tokenspeed_plan.runtime.loading.loading_report import Report, nobody
from tokenspeed_plan.runtime.request import SamplingParams

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.engine import Engine

# Largest allowed difference, as a share of the tensor's largest value, by the plan's dtype. A
# kernel adds up in another order, and keeps in fp32 what its references round to bf16 in between.
TOLERANCE: dict[DType, float] = {"fp32": 1e-4, "bf16": 3e-2}
FP8_STEP = 1 / 8  # what is rounded to another bf16 before may be one step of e4m3 off
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

    Results are compared on the host, so programs are launched eagerly.

    Attributes:
        tally: of all steps so far.
        report: is told which step of a program is compared.
    """

    full_size = False

    def __init__(self, plan: Plan, backend: KernelBackend) -> None:
        self.tally = Tally()
        self.report: Report = nobody
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
        number = self._plan.pool.index_of(program)
        for index, step in enumerate(program.steps):
            tensors = operands[index]
            kernel = self._backend.kernel_of(step)
            if kernel is None:
                yield step, self._bind_reference(step, tensors)
                continue
            library = self._backend.library_of(step)
            place = _Place(program, index)
            compare = _Comparison(self, place, kernel, num_tokens, num_seqs, number, library)
            yield step, [Instruction(compare, {}, tensors, ())]

    def _bind_reference(self, step: Step, tensors: tuple[Tensor, ...]) -> list[Instruction]:
        """A step that cannot be compared; calls without a kernel are counted."""
        instructions = self._backend.reference.bind_step(step, tensors)
        if isinstance(step, Call):
            count = Instruction(self._count_skipped, {}, (), ())
            instructions.append(count)
        return instructions

    def without_overlap(self) -> ComparingBackend:
        """Steps that are compared never overlap."""
        return self

    def run_reference(self, kernel: KernelSpec, tensors: tuple[Tensor, ...]) -> None:
        """Run the reference bodies of a kernel."""
        instructions = self._backend.reference.bind_kernel(kernel, tensors)
        execute(instructions, num_outputs(kernel))

    def launcher(
        self, kernel: KernelSpec, num_tokens: int, num_seqs: int, program: int
    ) -> Launcher:
        """A function that runs the kernel."""
        return self._backend.launcher(kernel, num_tokens, num_seqs, program)

    def judge(self, where: str, kernel: str, param: Param, results: tuple[Tensor, Tensor]) -> None:
        """Note the difference of two results, the kernel's and the wanted one.

        Raises:
            PlanError: it is over the tolerance; integers must be equal.
        """
        tolerance = 0.0
        if param.tensor.dtype == "fp8":
            tolerance = FP8_STEP
        elif results[0].is_floating_point():
            tolerance = self._tolerance
        if param.tensor.format.block:
            tolerance = max(tolerance, FP8_STEP)
            got, wanted = (dequantise(each, param.tensor, torch.float32) for each in results)
            results = got, wanted
        error = difference(*results)
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
class _Place:
    """A step of a program."""

    program: Program
    index: int

    @property
    def program_name(self) -> str:
        """Which program it is."""
        return f"{self.program.phase}/{self.program.bucket}"


@dataclass(frozen=True, slots=True)
class _Comparison:
    """Runs one step both ways, and compares what they wrote."""

    backend: ComparingBackend
    place: _Place
    kernel: KernelSpec
    num_tokens: int
    num_seqs: int
    program: int
    library: Launcher | None

    def __call__(self, attrs: object, *tensors: Tensor) -> tuple[()]:
        kernel, place = self.kernel, self.place
        stage = f"comparing steps of {place.program_name}"
        self.backend.report(stage, place.index, len(place.program.steps))
        wanted: list[Tensor] = []
        for param, tensor in zip(kernel.tensors, tensors, strict=True):
            if _is_written(param):
                wanted.append(tensor.clone())
            else:
                wanted.append(tensor)
            if param.role == "output":
                tensor.view(torch.uint8).fill_(0xFF)  # NaN: what the kernel leaves out shows
        self.backend.run_reference(kernel, tuple(wanted))
        launcher = self.library or self.backend.launcher(
            kernel, self.num_tokens, self.num_seqs, self.program
        )
        prepare_batch(launcher, tensors)
        launcher({}, *tensors)
        self.backend.tally.steps += 1
        for param, got, expected in zip(kernel.tensors, tensors, wanted, strict=True):
            if _is_written(param):
                where = f"step {place.index} of {place.program_name}, `{kernel.name}`"
                where += f", `{param.name}`"
                self.backend.judge(where, kernel.name, param, (got, expected))
        return ()


def _is_written(param: Param) -> bool:
    is_result = param.role in ("output", "state")
    return is_result and param.access != "read"


def difference(got: Tensor, wanted: Tensor) -> float:
    """The largest difference of two tensors, as a share of the largest finite value.

    It is NaN where infinities or NaNs differ. For integers it is the number of differing elements.
    """
    if not got.is_floating_point():
        num_different = (got != wanted).sum()
        return float(num_different)
    if got.dtype == torch.float8_e4m3fn:
        got, wanted = got.float(), wanted.float()
    is_finite = wanted.isfinite()
    got_finite = got[is_finite]
    wanted_finite = wanted[is_finite]
    others = (got[~is_finite], wanted[~is_finite])
    same = torch.allclose(*others, rtol=0.0, atol=0.0, equal_nan=True)
    if not same or not got_finite.isfinite().all():
        return float("nan")
    if not is_finite.any():
        return 0.0
    scale = wanted_finite.abs().max().float().item()
    gap = got_finite.float() - wanted_finite.float()
    largest = gap.abs().max().item()
    return largest / max(scale, MIN_SCALE)


def check_steps(
    engine: Engine,
    prompts: Mapping[str, tuple[int, ...]] | None = None,
    report: Report = nobody,
) -> Tally:
    """Compare all steps of a prefill and a few decode steps.

    Args:
        engine: loaded with the backend `compare`.
        prompts: token ids by name; by default those of the canary, or made-up ones.
        report: is told how far each program is.

    Raises:
        PlanError: kernel and reference differ; it names the first such step.
    """
    backend = engine.executor.backend
    assert isinstance(backend, ComparingBackend)
    assert isinstance(engine.executor.launch, EagerLaunch)
    backend.tally, backend.report = Tally(), report
    chosen = _prompts(engine)
    if prompts:
        chosen = list(prompts.values())
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    engine.generate(chosen[: engine.max_seqs], params)
    return backend.tally


def _prompts(engine: Engine) -> list[tuple[int, ...]]:
    """The prompts of the canary; without one, ascending token ids."""
    if engine.plan.canary:
        return [item.prompt_ids for item in engine.plan.canary]
    max_length = engine.max_seq_len - NUM_TOKENS
    prompts = []
    for wanted_length in PROMPT_LENGTHS:
        length = min(wanted_length, max_length)
        prompts.append(tuple(range(1, 1 + length)))
    return prompts
