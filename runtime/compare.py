"""Replay with both backend: each step as a Triton kernel and as its reference, on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.schema import KernelCall, KernelSpec, Program
from tokenspeed_plan.plans.types import DType
from tokenspeed_plan.runtime.engine import Engine
from tokenspeed_plan.runtime.executor import Executor
from tokenspeed_plan.runtime.request import SamplingParams

# Largest difference over the largest value of the tensor, by the plan's dtype: sums are taken in
# another order, and a kernel keeps in fp32 what its references round to bf16 in between.
TOLERANCE: dict[DType, float] = {"fp32": 1e-4, "bf16": 3e-2}
NUM_TOKENS = 4  # generated for each prompt


@dataclass(slots=True)
class Tally:
    """What was compared, and the largest difference."""

    steps: int = 0
    skipped: int = 0
    worst: float = 0.0
    worst_kernel: str = ""


class ComparingExecutor(Executor):
    """Runs every step twice and refuses the first that differs; goes on with what the kernel said."""

    tally: Tally

    @torch.inference_mode()
    def run(self, program: Program, num_tokens: int, num_seqs: int) -> None:
        """One replay, step by step.

        Raises:
            PlanError: naming the first step whose kernel and reference differ.
        """
        places = self.places(program, num_tokens, num_seqs)
        for index, step in enumerate(program.steps):
            tensors = self.tensors(step, places)
            kernel = self.kernels.get(step.kernel) if isinstance(step, KernelCall) else None
            if kernel is None or self.backend is None or not self.backend.has(kernel):
                self.tally.skipped += kernel is not None
                self.execute(self.reference(step, tensors))
                continue
            where = f"step {index} of {program.phase}/{program.bucket}, `{kernel.name}`"
            self._compare(where, kernel, tensors, num_tokens, num_seqs)

    def _compare(
        self,
        where: str,
        kernel: KernelSpec,
        tensors: tuple[Tensor, ...],
        num_tokens: int,
        num_seqs: int,
    ) -> None:
        assert self.backend is not None
        written = {
            i: p.name
            for i, p in enumerate(kernel.tensors)
            if p.role in ("output", "state") and p.access != "read"
        }
        wanted = tuple(x.clone() if i in written else x for i, x in enumerate(tensors))
        for index, param in enumerate(kernel.tensors):
            if param.role == "output":
                tensors[index].view(torch.uint8).fill_(0xFF)  # NaN: what is not written shows
        self.execute(self.reference_kernel(kernel, wanted))
        self.backend.launcher(kernel, self.rank, num_tokens, num_seqs, self.collectives)(
            {}, *tensors
        )
        self.tally.steps += 1
        for index, name in written.items():
            self._judge(f"{where}, `{name}`", kernel.name, tensors[index], wanted[index])

    def _judge(self, where: str, kernel: str, got: Tensor, wanted: Tensor) -> None:
        error = difference(got, wanted)
        exact = not got.is_floating_point()
        if not error <= (0.0 if exact else TOLERANCE[self.plan.model.dtype]):
            raise PlanError(
                f"{where}: kernel and reference differ by {error:.2e}",
                "the first such step; report it",
            )
        if error > self.tally.worst:
            self.tally.worst, self.tally.worst_kernel = error, kernel


def difference(got: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest finite value; NaN where only one is finite, or infinities differ."""
    if not got.is_floating_point():
        return float((got != wanted).sum())
    finite = wanted.isfinite()
    same = torch.allclose(got[~finite], wanted[~finite], rtol=0.0, atol=0.0, equal_nan=True)
    if not same or not got[finite].isfinite().all():
        return float("nan")
    if not finite.any():
        return 0.0
    scale = wanted[finite].abs().max().float().item()
    return (got[finite].float() - wanted[finite].float()).abs().max().item() / max(scale, 1e-6)


def check_steps(engine: Engine, prompts: Mapping[str, tuple[int, ...]] | None = None) -> Tally:
    """Compare all steps of prefill and a few of decode on the plan's canary prompts, or on made-up ones.

    Raises:
        PlanError: naming the first step that differs.
    """
    executor = engine.executor
    assert isinstance(executor, ComparingExecutor)
    executor.tally = Tally()
    known = [item.prompt_ids for item in engine.plan.canary]
    made_up = [tuple(range(1, 1 + min(n, engine.max_seq_len - NUM_TOKENS))) for n in (70, 3)]
    chosen = list(prompts.values()) if prompts else (known or made_up)
    engine.generate(
        chosen[: engine.max_seqs], SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    )
    return executor.tally
