"""Gated attention over a paged cache.

Shapes: T tokens, S sequences, R queries a sequence, Q query heads, K kv heads, D head_dim, P pages a
sequence, C cached tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Attrs = Mapping[str, Any]


def split_gate(attrs: Attrs, qg_TN: Tensor) -> tuple[Tensor, Tensor]:
    """Each head's columns are its query, then its gate."""
    qg = qg_TN.unflatten(-1, (attrs["num_heads"], 2, attrs["head_dim"]))
    return qg[:, :, 0].flatten(1), qg[:, :, 1].flatten(1)


@lru_cache(maxsize=8)
def _frequencies(
    rotary_dim: int, theta: float, factor: float, original: int
) -> tuple[Tensor, float]:
    """Angles per position for each pair, and the factor on cos and sin (YaRN, arXiv:2309.00071, where factor > 1)."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    inverse = theta**-exponent
    if factor == 1.0:
        return inverse, 1.0

    def pair_at(rotations: float) -> float:
        return rotary_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_at(32.0)), 0)
    high = min(math.ceil(pair_at(1.0)), rotary_dim - 1)
    pair = torch.arange(rotary_dim // 2, dtype=torch.float64)
    ramp = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
    scale = 0.1 * math.log(factor) + 1.0
    return inverse / factor * ramp + inverse * (1 - ramp), scale


def rope(attrs: Attrs, x_TN: Tensor, positions_T: Tensor) -> tuple[Tensor]:
    """Rotate the first `rotary_dim` of each head; dimension i is paired with i + rotary_dim / 2 (arXiv:2104.09864)."""
    rotary = attrs["rotary_dim"]
    inverse, scale = _frequencies(
        rotary, attrs["theta"], attrs["factor"], attrs["original_max_positions"]
    )
    x = x_TN.unflatten(-1, (attrs["num_heads"], attrs["head_dim"]))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    position = positions_T.to(wide)[:, None]
    angle = position * inverse.to(position)
    cos = (angle.cos() * scale).to(x.dtype)[:, None]
    sin = (angle.sin() * scale).to(x.dtype)[:, None]
    half = rotary // 2
    a, b, rest = x[..., :half], x[..., half:rotary], x[..., rotary:]
    return (torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1).flatten(1),)


def kv_write(attrs: Attrs, k_TN: Tensor, v_TN: Tensor, slots_T: Tensor, cache: Tensor) -> tuple[()]:
    """cache[page, 0 | 1, offset] = k | v, where slot = page * page_size + offset."""
    page_T = slots_T.long() // attrs["page_size"]
    offset_T = slots_T.long() % attrs["page_size"]
    heads = (attrs["num_kv_heads"], attrs["head_dim"])
    cache[page_T, 0, offset_T] = k_TN.unflatten(-1, heads)
    cache[page_T, 1, offset_T] = v_TN.unflatten(-1, heads)
    return ()


def attention(
    attrs: Attrs,
    q_TN: Tensor,
    page_table_SP: Tensor,
    context_S: Tensor,
    cu_seqlens: Tensor,
    cache: Tensor,
) -> tuple[Tensor]:
    """softmax(q k^T / sqrt(D)) v over each sequence's own pages, causal; `context` counts the new tokens too.

    In a decode step of R queries a sequence, query i sees R - 1 - i tokens less than the last one.
    """
    q = q_TN.unflatten(-1, (attrs["num_heads"], attrs["head_dim"]))
    if attrs["mode"] == "decode":
        return (_decode(q.unflatten(0, (len(context_S), -1)), page_table_SP, context_S, cache),)
    bounds, contexts = cu_seqlens.tolist(), context_S.tolist()
    rows = [
        _one_sequence(q[start:end], page_table_SP[i], contexts[i], cache)
        for i, (start, end) in enumerate(pairwise(bounds))
    ]
    return (torch.cat(rows),)


def _gather(page_table: Tensor, length: int, cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [..., K, C, D] of the first `length` tokens of pages [..., P]."""
    page_size = cache.shape[2]
    used = page_table[..., : -(-length // page_size)]
    pages = cache.index_select(0, used.flatten())
    pages = pages.unflatten(0, used.shape)  # [..., P, 2, page_size, K, D]
    kv = pages.movedim(-4, 0).flatten(-4, -3)  # [2, ..., P * page_size, K, D]
    kv = kv[..., :length, :, :].transpose(-2, -3)
    return kv[0], kv[1]


def _decode(q_SRQD: Tensor, page_table_SP: Tensor, context_S: Tensor, cache: Tensor) -> Tensor:
    """One query a sequence, or a few; shorter sequences are masked to the longest."""
    longest, query_len = int(context_S.max()), q_SRQD.shape[1]
    k, v = _gather(page_table_SP, longest, cache)
    queries_after_R = torch.arange(query_len - 1, -1, -1, device=context_S.device)
    seen_SR = context_S[:, None] - queries_after_R
    position_C = torch.arange(longest, device=context_S.device)
    visible_SRC = position_C < seen_SR[:, :, None]
    y = F.scaled_dot_product_attention(
        q_SRQD.transpose(1, 2), k, v, visible_SRC[:, None], enable_gqa=True
    )
    return y.transpose(1, 2).flatten(0, 1).flatten(1)


def _one_sequence(q_TQD: Tensor, pages_P: Tensor, length: int, cache: Tensor) -> Tensor:
    """All new queries of one sequence; its own keys are already in the cache."""
    count = q_TQD.shape[0]
    k, v = _gather(pages_P, length, cache)
    position_C = torch.arange(length, device=cache.device)
    visible = position_C[None] <= position_C[length - count :, None]
    y = F.scaled_dot_product_attention(
        q_TQD.transpose(0, 1)[None], k[None], v[None], visible, enable_gqa=True
    )
    return y[0].transpose(0, 1).flatten(1)


def sigmoid_gate(attrs: Attrs, x_TN: Tensor, g_TN: Tensor) -> tuple[Tensor]:
    """y = x * sigmoid(g)."""
    return (x_TN * torch.sigmoid(g_TN),)
