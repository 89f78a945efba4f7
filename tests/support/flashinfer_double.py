"""A double of the package `flashinfer-python`: what `runtime/libraries/flashinfer.py` calls.

Shapes: T tokens, Q query heads, K kv heads, D head_dim, N pages of the cache.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

VERSION = "0.6.9"


class BatchPrefillWithPagedKVCacheWrapper:
    """Attention by its documentation: a plan on the host, then any number of runs."""

    plans = 0  # of all wrappers

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str, backend: str) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "NHD" and backend in ("fa2", "fa3")
        self._planned: tuple[Any, ...] = ()

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        causal: bool = False,
        q_data_type: torch.dtype = torch.float16,
    ) -> None:
        """All lengths are of the host: reading them from a device would wait for it once more."""
        type(self).plans += 1
        for lengths in (qo_indptr, paged_kv_indptr, paged_kv_last_page_len):
            assert lengths.dtype == torch.int32 and lengths.device.type == "cpu"
        assert causal and len(paged_kv_indices) == paged_kv_indptr[-1]
        pages = paged_kv_indices.long().split(paged_kv_indptr.diff().tolist())
        heads = (num_qo_heads, num_kv_heads, head_dim_qk)
        last = paged_kv_last_page_len.tolist()
        self._planned = (qo_indptr.tolist(), pages, last, page_size, heads, q_data_type)

    def run(self, q_TQD: Tensor, paged_kv_cache: Tensor, out: Tensor) -> Tensor:
        """`paged_kv_cache` is [N, 2, page_size, K, D]."""
        starts, pages, last, page_size, (num_heads, num_kv_heads, head_dim), dtype = self._planned
        assert q_TQD.shape == (starts[-1], num_heads, head_dim) and q_TQD.dtype == dtype
        assert paged_kv_cache.shape[1:] == (2, page_size, num_kv_heads, head_dim)
        for (start, end), own, rest in zip(pairwise(starts), pages, last, strict=True):
            length = (len(own) - 1) * page_size + rest
            assert 0 < rest <= page_size and length >= end - start
            kept = paged_kv_cache[own].transpose(0, 1).flatten(1, 2)[:, :length]
            keys, values = kept.transpose(1, 2).unsqueeze(1)
            first = length - (end - start)
            seen = torch.arange(length) <= torch.arange(first, length)[:, None]
            queries = q_TQD[start:end].transpose(0, 1)[None]
            y = F.scaled_dot_product_attention(queries, keys, values, seen, enable_gqa=True)
            out[start:end] = y[0].transpose(0, 1)
        return out


def install_flashinfer(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make the double an installed distribution in this folder, which is empty."""
    module = ModuleType("flashinfer")
    vars(module)["BatchPrefillWithPagedKVCacheWrapper"] = BatchPrefillWithPagedKVCacheWrapper
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(BatchPrefillWithPagedKVCacheWrapper, "plans", 0)
    info = folder / f"flashinfer_python-{VERSION}.dist-info"
    info.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: flashinfer-python\nVersion: {VERSION}\n"
    (info / "METADATA").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
