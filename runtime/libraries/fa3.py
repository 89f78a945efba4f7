"""FlashAttention-3 (arXiv:2407.08608) for prefill, from the package `tokenspeed-fa3`.

Shapes: T tokens, S sequences, P pages of a sequence, N pages of the cache, Q query heads, K kv
heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed_plan.plans.schema import KernelSpec
from tokenspeed_plan.runtime.execution.kernels import Launcher
from tokenspeed_plan.runtime.libraries.paged_attention import PagedAttention


def attention_prefill(kernel: KernelSpec) -> Launcher:
    """A function of the kernel's tensors: causal attention over pages, and its gate if it has one.

    Raises:
        ImportError: the package is not there, or not for this PyTorch.
    """
    import flash_attn_3._C  # type: ignore[import-not-found]  # noqa: F401  # pyright: ignore

    forward = torch.ops.flash_attn_3.fwd
    call = PagedAttention.of(kernel)

    def run(_: object, *tensors: Tensor) -> tuple[()]:
        q_TN, cache, page_table_SP, context_S, cu_seqlens = (tensors[i] for i in call.operands)
        forward(
            q_TN.unflatten(-1, call.heads),
            *cache.unbind(1),  # [N, page_size, K, D] of keys and of values
            out=tensors[call.result].unflatten(-1, call.heads),
            cu_seqlens_q=cu_seqlens,
            seqused_k=context_S,
            max_seqlen_q=len(q_TN),  # at most; the lengths themselves are on the device
            page_table=page_table_SP,
            softmax_scale=call.head_dim**-0.5,
            is_causal=True,
        )
        call.multiply_by_gate(tensors)
        return ()

    return run
