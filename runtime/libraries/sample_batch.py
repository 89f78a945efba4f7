"""A batch for a kernel that a library computes; for attention ragged sequences with mixed pages.

Shapes: T tokens, S sequences, P pages of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenspeed_plan.plans.fp8_format import FP8, FP8_ROWS
from tokenspeed_plan.plans.libraries import operands_by_role
from tokenspeed_plan.plans.ops import integer
from tokenspeed_plan.plans.schema import KernelSpec
from tokenspeed_plan.runtime.execution.arenas import TORCH_DTYPES
from tokenspeed_plan.runtime.execution.fp8_blocks import flat_run, quantise_blocks, quantise_rows

NEW_TOKENS = (3, 70, 1)  # of each sequence
CONTEXTS = (3, 201, 64)  # with them: a first chunk, one that crosses pages, one that fills one
_SEED = 1


def sample_batch(
    kernel: KernelSpec,
    device: torch.device,
    new_tokens: Sequence[int] = NEW_TOKENS,
    contexts: Sequence[int] = CONTEXTS,
) -> tuple[Tensor, ...]:
    """The tensors of a call, in the order of the kernel's parameters.

    Args:
        kernel: attention, or a product, with or without what follows it in one kernel.
        device: where the tensors are.
        new_tokens: of each sequence.
        contexts: tokens of each sequence, the new ones included.
    """
    indices, cache, num_pages = dict[str, Tensor](), "", 0
    if kernel.parts[0].kind == "attention":
        roles = operands_by_role(kernel, "attention")
        page_size = integer(kernel.parts[0].attrs, "page_size")
        pages = [-(-length // page_size) for length in contexts]
        cache, num_pages = roles["kv_cache"], sum(pages) + 1
        indices = {
            roles["page_table"]: _page_table(pages, _width(kernel, roles["page_table"])),
            roles["context_lens"]: torch.tensor(contexts),
            roles["cu_seqlens"]: torch.tensor([0, *new_tokens]).cumsum(0),
        }
    random = torch.Generator(device).manual_seed(_SEED)
    tensors = []
    for param in kernel.tensors:
        if param.name in indices:
            tensors.append(indices[param.name].to(device, torch.int32))
            continue
        shape = list(param.tensor.bind(sum(new_tokens), len(new_tokens)))
        if param.name == cache:
            shape[0] = num_pages
        dtype = TORCH_DTYPES[param.tensor.dtype]
        if param.role == "scratch":
            tensors.append(torch.zeros(shape, dtype=dtype, device=device))
            continue
        values = torch.randn(shape, generator=random, device=device)
        if param.tensor.format == FP8_ROWS:
            tensors.append(quantise_rows(values))
        elif param.tensor.format == FP8:
            tensors.append(flat_run(quantise_blocks(values)))
        else:
            tensors.append(values.to(dtype))
    return tuple(tensors)


def _width(kernel: KernelSpec, name: str) -> int:
    """Pages of a line of the page table as planned."""
    spec = next(param.tensor for param in kernel.tensors if param.name == name)
    return spec.bind(0, 0)[1]


def _page_table(pages: list[int], width: int) -> Tensor:
    """[S, P]: the pages of each sequence, those of all in falling order; page 0 pads."""
    numbers = torch.arange(sum(pages), 0, -1)
    table_SP = torch.zeros(len(pages), max(*pages, width), dtype=torch.int64)
    for line, own in zip(table_SP, numbers.split(pages), strict=True):
        line[: len(own)] = own
    return table_SP
