"""FlashInfer (arXiv:2501.01005) for prefill, from the package `flashinfer-python`.

It compiles its kernels with nvcc when it first plans a batch, which takes minutes, and keeps them
in its cache. The host plans each batch, once for all layers: for that it reads the lengths of the
sequences back, so it waits for the steps before.

Shapes: T tokens, S sequences, P pages of a sequence, N pages of the cache, K kv heads, D head_dim.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tokenspeed_plan.plans.libraries import FLASHINFER_WORKSPACE_BYTES
from tokenspeed_plan.plans.schema import KernelSpec
from tokenspeed_plan.runtime.execution.kernels import PreparedFunction
from tokenspeed_plan.runtime.libraries.paged_attention import PagedAttention

# Of few queries behind many keys `fa2` splits the keys, which `fa3` does not: on an H200 64 tokens
# behind 50,000 take 0.39 and 3.5 ms, 800 take 5.8 and 3.5 ms.
FEW_QUERIES, BACKENDS = 512, ("fa2", "fa3")


class PagedPrefill(PreparedFunction):
    """A function of the kernel's tensors: causal attention over pages, and its gate if it has one.

    Args:
        kernel: of attention.
        backends: of FlashInfer's; the first one for few queries, the last one for more.

    Raises:
        ImportError: the package is not there.
    """

    def __init__(self, kernel: KernelSpec, backends: Sequence[str] = BACKENDS) -> None:
        from flashinfer import (  # type: ignore[import-not-found]
            BatchPrefillWithPagedKVCacheWrapper,
        )

        self._make_wrapper = BatchPrefillWithPagedKVCacheWrapper
        self._backends = backends
        self._call = PagedAttention.of(kernel)
        self._wrappers: dict[str, Any] = {}  # made with the first batch, which knows the device
        self._planned = ""

    def prepare(self, *tensors: Tensor) -> None:
        """Plan a batch; while a graph is captured it is the batch of the run before.

        The first batch is planned for all back ends, so that all of them are compiled.
        """
        q_TN, _, page_table_SP, context_S, cu_seqlens = (tensors[i] for i in self._call.operands)
        if q_TN.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self._planned = self._backends[-1]
        if len(q_TN) < FEW_QUERIES:
            self._planned = self._backends[0]
        due = [self._planned]
        if not self._wrappers:
            workspace, due = _workspace(q_TN.device), list(self._backends)
            self._wrappers = {
                name: self._make_wrapper(workspace, "NHD", backend=name) for name in due
            }
        for name in due:
            self._plan(self._wrappers[name], q_TN, page_table_SP, context_S.cpu(), cu_seqlens.cpu())

    def _plan(
        self,
        wrapper: Any,
        q_TN: Tensor,
        page_table_SP: Tensor,
        lengths: Tensor,
        cu_seqlens: Tensor,
    ) -> None:
        """`lengths` and `cu_seqlens` are on the host."""
        call = self._call
        pages = (lengths + call.page_size - 1) // call.page_size
        used = [line[:count] for line, count in zip(page_table_SP, pages.tolist(), strict=True)]
        wrapper.plan(
            cu_seqlens,
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
        q_TN, kv_cache = (tensors[i] for i in call.operands[:2])
        result = tensors[call.result].unflatten(-1, call.heads)
        self._wrappers[self._planned].run(q_TN.unflatten(-1, call.heads), kv_cache, out=result)
        call.multiply_by_gate(tensors)
        return ()


@cache
def _workspace(device: torch.device) -> Tensor:
    """Memory that calls use one after the other."""
    return torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
