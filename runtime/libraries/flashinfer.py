"""FlashInfer (arXiv:2501.01005) for prefill, from the package `flashinfer-python`.

It compiles its kernels with nvcc when it first plans a batch, which takes minutes, and keeps them
in its cache. The host plans each batch, once for all layers: for that it reads the lengths of the
sequences back, so it waits for the steps before.

Shapes: T tokens, S sequences, P pages of a sequence, N pages of the cache, K kv heads, D head_dim.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from tokenspeed_plan.plans.libraries import FLASHINFER_WORKSPACE_BYTES
from tokenspeed_plan.plans.schema import KernelSpec
from tokenspeed_plan.runtime.execution.kernels import PreparedFunction
from tokenspeed_plan.runtime.libraries.paged_attention import PagedAttention


class PagedPrefill(PreparedFunction):
    """A function of the kernel's tensors: causal attention over pages, and its gate if it has one.

    Args:
        kernel: of attention.
        backend: of FlashInfer's: `fa2`, or `fa3` on Hopper.

    Raises:
        ImportError: the package is not there.
    """

    def __init__(self, kernel: KernelSpec, backend: str) -> None:
        from flashinfer import (  # type: ignore[import-not-found]
            BatchPrefillWithPagedKVCacheWrapper,
        )

        self._make_wrapper = BatchPrefillWithPagedKVCacheWrapper
        self._backend = backend
        self._call = PagedAttention.of(kernel)
        self._wrapper: Any = None  # made with the first batch, which knows the device

    def prepare(self, *tensors: Tensor) -> None:
        """Plan a batch; while a graph is captured it is the batch of the run before."""
        call = self._call
        q_TN, _, page_table_SP, context_S, cu_seqlens = (tensors[i] for i in call.operands)
        if q_TN.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if self._wrapper is None:
            workspace = _workspace(q_TN.device)
            self._wrapper = self._make_wrapper(workspace, "NHD", backend=self._backend)
        lengths = context_S.cpu()
        pages = (lengths + call.page_size - 1) // call.page_size
        used = [line[:count] for line, count in zip(page_table_SP, pages.tolist(), strict=True)]
        self._wrapper.plan(
            cu_seqlens.cpu(),
            torch.cat([pages.new_zeros(1), pages.cumsum(0, dtype=torch.int32)]),
            torch.cat(used),
            (lengths - 1) % call.page_size + 1,
            call.num_heads,
            call.num_kv_heads,
            call.head_dim,
            call.page_size,
            causal=True,
            q_data_type=q_TN.dtype,
        )

    def __call__(self, _: object, *tensors: Tensor) -> tuple[()]:
        """Compute the batch that was planned."""
        call = self._call
        q_TN, cache = (tensors[i] for i in call.operands[:2])
        result = tensors[call.result].unflatten(-1, call.heads)
        self._wrapper.run(q_TN.unflatten(-1, call.heads), cache, out=result)
        call.multiply_by_gate(tensors)
        return ()


@cache
def _workspace(device: torch.device) -> Tensor:
    """Memory that calls use one after the other."""
    return torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def attention_prefill(kernel: KernelSpec) -> PagedPrefill:
    """Attention of prompts by the back end that is fastest on Hopper."""
    return PagedPrefill(kernel, "fa3")
