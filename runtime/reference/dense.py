"""Embedding, norms, products and other bodies that look at one token at a time.

Shapes: T tokens, S sequences, H hidden, N outputs, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenspeed_plan.runtime.execution.fp8_blocks import quantise_rows

Attrs = Mapping[str, Any]


def widen(x: Tensor) -> Tensor:
    """x in the accumulation dtype: fp64 where it is fp64, else fp32."""
    if x.dtype == torch.float64:
        return x
    return x.float()


def embed(attrs: Attrs, ids: Tensor, table_VH: Tensor) -> tuple[Tensor]:
    """y = table[ids].

    A rank that holds only a part of the table, from row `row_start` on, gives zeros for the ids of
    other ranks. Where `ids` is a matrix [S, drafts], its last column is used: the latest draft.
    """
    ids_T = ids
    if ids.dim() > 1:
        ids_T = ids[:, -1]
    if "row_start" not in attrs:
        return (table_VH.index_select(0, ids_T),)
    num_rows = table_VH.shape[0]
    row_T = ids_T.long() - int(attrs["row_start"])
    is_here_T = (row_T >= 0) & (row_T < num_rows)
    row_T = row_T.where(is_here_T, 0)
    y_TH = table_VH[row_T]
    return (y_TH * is_here_T.unsqueeze(1),)


def normalize(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension (arXiv:1910.07467).

    The result is in the accumulation dtype.
    """
    wide = widen(x)
    mean = wide.square().mean(-1, keepdim=True)
    return wide * torch.rsqrt(mean + eps)


def rms_norm(attrs: Attrs, x_TH: Tensor, w_H: Tensor) -> tuple[Tensor]:
    """y = x / sqrt(mean(x^2) + eps) * (1 + w): the stored weight is the offset from one.

    With `plain` it is the factor w itself.
    """
    normed_TH, wide_H = normalize(x_TH, attrs["eps"]), widen(w_H)
    if attrs.get("plain"):
        return ((normed_TH * wide_H).to(x_TH.dtype),)
    return (torch.addcmul(normed_TH, normed_TH, wide_H).to(x_TH.dtype),)


def head_norm(attrs: Attrs, x_TN: Tensor, w_D: Tensor) -> tuple[Tensor]:
    """`rms_norm` of each head."""
    x = x_TN.view(-1, attrs["num_heads"], attrs["head_dim"])
    (y,) = rms_norm(attrs, x, w_D)
    return (y.flatten(-2),)


def linear(attrs: Attrs, x_TK: Tensor, w_NK: Tensor) -> tuple[Tensor, ...]:
    """y = x w^T, its columns split into outputs of `splits` columns."""
    y_TN = F.linear(x_TK, w_NK)
    splits = attrs["splits"]
    if len(splits) == 1:
        return (y_TN,)
    return y_TN.split_with_sizes(splits, -1)


def quantise(attrs: Attrs, x_TK: Tensor) -> tuple[Tensor]:
    """x in FP8, with a factor for each row and 128 columns: a flat run of bytes."""
    return (quantise_rows(x_TK),)


def add(attrs: Attrs, x_TH: Tensor, r_TH: Tensor) -> tuple[Tensor]:
    """y = x + r."""
    return (x_TH + r_TH,)


def silu_mul(attrs: Attrs, x_TN: Tensor) -> tuple[Tensor]:
    """y = silu(gate) * up, x = [gate | up] (SwiGLU, arXiv:2002.05202)."""
    gate, up = x_TN.chunk(2, -1)
    y = F.silu(gate) * up
    return (y,)


def last_token(attrs: Attrs, x_TH: Tensor, cu_seqlens: Tensor) -> tuple[Tensor]:
    """The last token of each sequence, [S, H]."""
    last_S = cu_seqlens[1:] - 1
    return (x_TH.index_select(0, last_S),)


def concat(attrs: Attrs, x_TH: Tensor, r_TH: Tensor) -> tuple[Tensor]:
    """y = [x | r]."""
    y = torch.cat((x_TH, r_TH), -1)
    return (y,)
