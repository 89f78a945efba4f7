"""Embedding, norms, products and other bodies that look at one token at a time.

Shapes: T tokens, S sequences, H hidden, N outputs, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Attrs = Mapping[str, Any]


def widen(x: Tensor) -> Tensor:
    """x in the accumulation dtype: fp32, or fp64 where it is fp64."""
    return x if x.dtype == torch.float64 else x.float()


def embed(attrs: Attrs, ids: Tensor, table_VH: Tensor) -> tuple[Tensor]:
    """y = table[ids]; a rank that holds only rows from `row_start` on gives zeros for the others.

    Where `ids` is a matrix (one row for each sequence), the last column counts: the latest draft.
    """
    ids_T = ids if ids.dim() == 1 else ids[:, -1]
    rows_T = ids_T.long() - int(attrs.get("row_start", 0))
    if "row_start" not in attrs:
        return (table_VH.index_select(0, rows_T),)
    mine_T = (rows_T >= 0) & (rows_T < table_VH.shape[0])
    return (table_VH[rows_T.where(mine_T, 0)] * mine_T[:, None],)


def normalize(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, in the accumulation dtype (arXiv:1910.07467)."""
    wide = widen(x)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def rms_norm(attrs: Attrs, x_TH: Tensor, w_H: Tensor) -> tuple[Tensor]:
    """y = x / sqrt(mean(x^2) + eps) * (1 + w): the stored weight is the offset from one.

    With `plain` it is the factor w itself.
    """
    factor_H = widen(w_H)
    if not attrs.get("plain"):
        factor_H = 1 + factor_H
    y_TH = normalize(x_TH, attrs["eps"]) * factor_H
    return (y_TH.to(x_TH.dtype),)


def head_norm(attrs: Attrs, x_TN: Tensor, w_D: Tensor) -> tuple[Tensor]:
    """`rms_norm` of each head."""
    heads = x_TN.unflatten(-1, (attrs["num_heads"], attrs["head_dim"]))
    (y,) = rms_norm(attrs, heads, w_D)
    return (y.flatten(-2),)


def linear(attrs: Attrs, x_TK: Tensor, w_NK: Tensor) -> tuple[Tensor, ...]:
    """y = x w^T, cut into columns."""
    y_TN = F.linear(x_TK, w_NK)
    return tuple(y_TN.split(attrs["splits"], -1))


def add(attrs: Attrs, x_TH: Tensor, r_TH: Tensor) -> tuple[Tensor]:
    """y = x + r."""
    return (x_TH + r_TH,)


def silu_mul(attrs: Attrs, x_TN: Tensor) -> tuple[Tensor]:
    """y = silu(gate) * up, x = [gate | up] (SwiGLU, arXiv:2002.05202)."""
    gate, up = x_TN.chunk(2, -1)
    return (F.silu(gate) * up,)


def last_token(attrs: Attrs, x_TH: Tensor, cu_seqlens: Tensor) -> tuple[Tensor]:
    """The last row of each sequence."""
    return (x_TH.index_select(0, cu_seqlens[1:] - 1),)


def concat(attrs: Attrs, x_TH: Tensor, r_TH: Tensor) -> tuple[Tensor]:
    """y = [x | r]."""
    return (torch.cat((x_TH, r_TH), -1),)
