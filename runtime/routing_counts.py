"""Counts which experts each layer's router chooses, while prompts run on the reference backend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.plans.schema import KernelSpec, Plan, Program
from tokenspeed_plan.runtime.engine import Engine
from tokenspeed_plan.runtime.execution.backend import BoundStep, Instruction, ReferenceBackend
from tokenspeed_plan.runtime.execution.executor import Executor
from tokenspeed_plan.runtime.loading.engine_loader import load_parts
from tokenspeed_plan.runtime.request import SamplingParams

HINT = "its file of rows decides how many tokens run; a few thousand are enough"


class CountingBackend(ReferenceBackend):
    """The reference backend, where each layer's top-k adds up how many tokens chose each expert."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.counts: dict[int, Tensor] = {}
        self.num_tokens = 0
        self.per_token = 0
        self._layer = 0

    def bind(
        self,
        program: Program,
        operands: Sequence[tuple[Tensor, ...]],
        num_tokens: int,
        num_seqs: int,
    ) -> Iterator[BoundStep]:
        """Each step with its instructions; routers are numbered as they come."""
        self._layer = 0
        yield from super().bind(program, operands, num_tokens, num_seqs)

    def bind_kernel(self, kernel: KernelSpec, tensors: tuple[Tensor, ...]) -> list[Instruction]:
        """The instructions of a kernel's parts; layers that share a kernel are counted apart."""
        bound = super().bind_kernel(kernel, tensors)
        return [
            self._counting(each) if part.kind == "topk" else each
            for part, each in zip(kernel.parts, bound, strict=True)
        ]

    def _counting(self, router: Instruction) -> Instruction:
        layer = self._layer
        self._layer += 1

        def counting(attrs: Mapping[str, Any], logits_TE: Tensor) -> tuple[Tensor, ...]:
            weights_Tk, ids_Tk = router.body(attrs, logits_TE)
            self._count(layer, ids_Tk, logits_TE.shape[1])
            return weights_Tk, ids_Tk

        return router._replace(body=counting)

    def _count(self, layer: int, ids_Tk: Tensor, num_experts: int) -> None:
        found = torch.bincount(ids_Tk.flatten().long(), minlength=num_experts)
        self.counts[layer] = self.counts.get(layer, torch.zeros_like(found)) + found
        self.per_token = ids_Tk.shape[1]
        if layer == 0:
            self.num_tokens += len(ids_Tk)


def count_routing(plan: Plan, folder: Path, prompts: Sequence[Sequence[int]]) -> CountingBackend:
    """The choices of all tokens of prompts.

    Raises:
        RequestError: the model has no router, or a prompt cannot run.
    """
    loaded = load_parts(plan, folder)
    backend = CountingBackend(loaded.plan)
    executor = Executor(loaded.executor.memory, backend)
    engine = Engine(loaded.plan, executor, loaded.tokenizer, None, False)
    # The first token ends each answer: the choices are those of the prompts.
    for done in engine.generate(prompts, SamplingParams(max_tokens=1, ignore_eos=True)):
        if done.error is not None:
            raise RequestError(f"a prompt cannot run: {done.error}", HINT)
    if not backend.counts:
        raise RequestError("the model has no experts that are chosen", "measure a model that has")
    return backend
