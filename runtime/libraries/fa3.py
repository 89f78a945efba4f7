"""FlashAttention-3 (arXiv:2407.08608) for prefill, from the package `tokenspeed-fa3`.

Shapes: T tokens, S sequences, P pages of a sequence, N pages of the cache, Q query heads, K kv
heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed_plan.plans.libraries import operands_by_role
from tokenspeed_plan.plans.ops import integer
from tokenspeed_plan.plans.schema import KernelSpec
from tokenspeed_plan.runtime.execution.kernels import Launcher


def attention_prefill(kernel: KernelSpec) -> Launcher:
    """A function of the kernel's tensors: causal attention over pages, and its gate if it has one.

    Raises:
        ImportError: the package is not there, or not for this PyTorch.
    """
    import flash_attn_3._C  # type: ignore[import-not-found]  # noqa: F401  # pyright: ignore

    forward = torch.ops.flash_attn_3.fwd
    places = {param.name: index for index, param in enumerate(kernel.tensors)}
    roles = operands_by_role(kernel, "attention")
    names = ("q", "kv_cache", "page_table", "context_lens", "cu_seqlens")
    operands = [places[roles[name]] for name in names]
    result = places[kernel.parts[-1].outputs[0]]
    gate = _gate(kernel, places)
    attrs = kernel.parts[0].attrs
    heads = (integer(attrs, "num_heads"), integer(attrs, "head_dim"))

    def run(_: object, *tensors: Tensor) -> tuple[()]:
        q_TN, cache, page_table_SP, context_S, cu_seqlens = (tensors[i] for i in operands)
        y_TN = tensors[result]
        forward(
            q_TN.unflatten(-1, heads),
            *cache.unbind(1),  # [N, page_size, K, D] of keys and of values
            out=y_TN.unflatten(-1, heads),
            cu_seqlens_q=cu_seqlens,
            seqused_k=context_S,
            max_seqlen_q=len(q_TN),  # at most; the lengths themselves are on the device
            page_table=page_table_SP,
            softmax_scale=heads[1] ** -0.5,
            is_causal=True,
        )
        if gate is not None:
            y_TN.mul_(tensors[gate].sigmoid())
        return ()

    return run


def _gate(kernel: KernelSpec, places: dict[str, int]) -> int | None:
    """The place of the gate among the kernel's tensors."""
    if kernel.parts[-1].kind != "sigmoid_gate":
        return None
    return places[operands_by_role(kernel, "sigmoid_gate")["g"]]
