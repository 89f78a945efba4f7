"""Finds kernels that read results of their predecessors before they wait for them.

On a GPU a kernel starts while those before it end (programmatic dependent launch). The interpreter
runs them one after the other, so this simulates it: until a kernel waits, what its predecessors
write holds NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from kernel_lab import PAGE, Case
from torch import Tensor

from tokenspeed_plan.plans.kernel_file import kind_of
from tokenspeed_plan.plans.ops import BATCH_INPUTS
from tokenspeed_plan.plans.schema import KernelSpec


@contextmanager
def overlapped(kernel: KernelSpec, tensors: list[Tensor], case: Case) -> Iterator[None]:
    """Results of earlier kernels appear only when a program waits for them."""
    import triton.language.extra.cuda as cuda  # Triton must be loaded after `interpret`.

    values = {param.name: x for param, x in zip(kernel.tensors, tensors, strict=True)}
    missing = [x.view(-1) for name, x in values.items() if _is_pending(kernel, name)]
    whole = [x.clone() for x in missing]
    cache = values.get("attention_kv_cache")
    slots = _new_slots(values, case) if cache is not None else []
    kept = [cache[page, :, place].clone() for page, place in slots] if cache is not None else []

    def begin() -> None:
        for x in missing:
            x.fill_(torch.nan if x.is_floating_point() else 0)
        for page, place in slots:
            values["attention_kv_cache"][page, :, place] = torch.nan

    def wait() -> None:
        for x, there in zip(missing, whole, strict=True):
            x.copy_(there)
        for (page, place), there in zip(slots, kept, strict=True):
            values["attention_kv_cache"][page, :, place] = there

    before = cuda.gdc_launch_dependents, cuda.gdc_wait
    cuda.gdc_launch_dependents = begin
    if kernel.launch is not None and kernel.launch.trigger_after_wait:
        cuda.gdc_launch_dependents = _do_nothing
    cuda.gdc_wait = wait
    begin()
    try:
        yield
    finally:
        cuda.gdc_launch_dependents, cuda.gdc_wait = before


def _do_nothing() -> None:
    pass


def _is_pending(kernel: KernelSpec, name: str) -> bool:
    """Whether a kernel of the same step writes it; in a draft pass also `context_lens`."""
    param = next(param for param in kernel.params if param.name == name)
    drafts = kind_of(kernel) == "attention_gate" and kernel.params[0].tensor.shape[0] == "num_seqs"
    given = BATCH_INPUTS - ({"context_lens"} if drafts else set())
    early = kernel.launch.prefetch if kernel.launch else ()
    return (
        param.role == "input"
        and name not in early
        and not any(name == role or name.endswith("_" + role) for role in given)
    )


def _new_slots(values: Mapping[str, Tensor], case: Case) -> list[tuple[int, int]]:
    """(page, position in it) of the tokens of this step."""
    table, contexts = values["attention_page_table"], values["attention_context_lens"].tolist()
    return [
        (int(table[s, position // PAGE]), position % PAGE)
        for s, (context, count) in enumerate(zip(contexts, case.lengths, strict=True))
        for position in range(context - count, context)
    ]
