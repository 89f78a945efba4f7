"""Gated attention over a paged cache.

Shapes: T tokens, S sequences, R queries of a sequence, Q query heads, K kv heads, D head_dim, N
heads * D, P pages of a sequence, C cached tokens.
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

from tokenspeed_plan.plans.fp8_format import E4M3_MAX

Attrs = Mapping[str, Any]
FP8 = torch.float8_e4m3fn


def split_gate(attrs: Attrs, qg_TN: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of each head are its query, then its gate."""
    qg = qg_TN.view(-1, attrs["num_heads"], 2, attrs["head_dim"])
    q, gate = qg.unbind(2)
    return q.flatten(1), gate.flatten(1)


@lru_cache(maxsize=8)
def _frequencies(
    rotary_dim: int,
    theta: float,
    factor: float,
    original: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, float]:
    """Radians per position of each pair of dimensions, and the factor on cos and sin.

    Where factor > 1, by YaRN (arXiv:2309.00071): pairs that turn more than 32 times within the
    original context keep their frequency, those that turn less than once are slowed by the factor.
    """
    dim = torch.arange(0, rotary_dim, 2, dtype=torch.float64)
    exponent = dim / rotary_dim
    inverse = theta**-exponent
    if factor == 1.0:
        return inverse.to(device, dtype), 1.0

    def pair_at(rotations: float) -> float:
        radians = rotations * 2 * math.pi
        ratio = math.log(original / radians)
        double_log = 2 * math.log(theta)
        return rotary_dim * ratio / double_log

    low = max(math.floor(pair_at(32.0)), 0)
    high = min(math.ceil(pair_at(1.0)), rotary_dim - 1)
    pair = torch.arange(rotary_dim // 2, dtype=torch.float64)
    width = max(high - low, 0.001)
    ramp = ((pair - low) / width).clamp(0, 1)
    scale = 0.1 * math.log(factor) + 1.0
    slowed = inverse / factor * ramp
    kept = inverse * (1 - ramp)
    return (slowed + kept).to(device, dtype), scale


def rope(attrs: Attrs, x_TN: Tensor, positions_T: Tensor) -> tuple[Tensor]:
    """Rotate the first `rotary_dim` dimensions of each head (arXiv:2104.09864).

    Dimension i is paired with dimension i + rotary_dim / 2.
    """
    rotary_dim = attrs["rotary_dim"]
    half = rotary_dim // 2
    x = x_TN.view(-1, attrs["num_heads"], attrs["head_dim"])
    num_rest = x.shape[-1] - rotary_dim
    a, b, rest = x.split_with_sizes((half, half, num_rest), -1)
    cos, sin = _rotation(attrs, positions_T, x.dtype)
    rotated_a = a * cos - b * sin
    rotated_b = b * cos + a * sin
    y = torch.cat((rotated_a, rotated_b, rest), -1)
    return (y.flatten(1),)


def _rotation(attrs: Attrs, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the angle at each position, [T, 1, rotary_dim / 2]."""
    wide = torch.float32
    if dtype == torch.float64:
        wide = torch.float64
    inverse, scale = _frequencies(
        attrs["rotary_dim"],
        attrs["theta"],
        attrs["factor"],
        attrs["original_max_positions"],
        wide,
        positions_T.device,
    )
    angle = positions_T.view(-1, 1, 1) * inverse
    cos, sin = angle.cos(), angle.sin()
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    return cos.to(dtype), sin.to(dtype)


def kv_write(attrs: Attrs, k_TN: Tensor, v_TN: Tensor, slots_T: Tensor, cache: Tensor) -> tuple[()]:
    """cache[page, 0 | 1, offset] = k | v, where slot = page * page_size + offset."""
    page_size = attrs["page_size"]
    page_T = slots_T // page_size
    offset_T = slots_T % page_size
    bits = cache
    if cache.dtype == FP8:  # PyTorch has no indexed writes of it
        bits = cache.view(torch.uint8)
        k_TN = _fp8_bits(k_TN / attrs.get("k_scale", 1.0))
        v_TN = _fp8_bits(v_TN / attrs.get("v_scale", 1.0))
    kv_T2N = torch.stack((k_TN, v_TN), 1)
    kv_T2KD = kv_T2N.view(-1, 2, attrs["num_kv_heads"], attrs["head_dim"])
    bits.transpose(1, 2)[page_T, offset_T] = kv_T2KD
    return ()


def _fp8_bits(x: Tensor) -> Tensor:
    """Rounded to e4m3; what is larger than its largest number becomes that."""
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(FP8).view(torch.uint8)


def attention(
    attrs: Attrs,
    q_TN: Tensor,
    page_table_SP: Tensor,
    context_S: Tensor,
    cu_seqlens: Tensor,
    cache: Tensor,
) -> tuple[Tensor]:
    """softmax(q k^T / sqrt(D)) v over the pages of each sequence, causal.

    `context` has the tokens of each sequence, the new ones included. In a decode step of R queries
    query i sees R - 1 - i tokens less than the last one.
    """
    heads = (attrs["num_heads"], attrs["head_dim"])
    if attrs["mode"] == "decode":
        q_SRQD = q_TN.view(len(context_S), -1, *heads)
        return (_decode(attrs, q_SRQD, page_table_SP, context_S, cache),)
    q_TQD = q_TN.view(-1, *heads)
    contexts = context_S.tolist()
    bounds = cu_seqlens.tolist()
    outputs = []
    for i, (start, end) in enumerate(pairwise(bounds)):
        y_TN = _one_sequence(
            attrs,
            q_TQD[start:end],
            page_table_SP[i],
            contexts[i],
            cache,
        )
        outputs.append(y_TN)
    y_TN = torch.cat(outputs)
    return (y_TN,)


def _gather(
    attrs: Attrs, page_table: Tensor, length: int, cache: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values [..., K, C, D] of the first `length` tokens of pages [..., P].

    Keys are copied apart from values: so the pages of a sequence lie one after the other.
    """
    page_size = cache.shape[2]
    num_pages = -(-length // page_size)
    used = page_table[..., :num_pages]
    k, v = (_first_tokens(half, used, length, dtype) for half in cache.unbind(1))
    if cache.dtype == FP8:
        k, v = k * attrs.get("k_scale", 1.0), v * attrs.get("v_scale", 1.0)
    return k, v


def _first_tokens(half: Tensor, pages: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The first `length` tokens of pages [..., P] of keys or of values, [..., K, C, D]."""
    chosen = pages.flatten()
    if half.dtype == FP8:  # which PyTorch cannot index
        copied = half.view(torch.uint8).index_select(0, chosen).view(FP8).to(dtype)
    else:
        copied = half.index_select(0, chosen)
    tokens = copied.view(*pages.shape[:-1], -1, *half.shape[2:])  # [..., P * page_size, K, D]
    return tokens.narrow(-3, 0, length).transpose(-2, -3)


def _decode(
    attrs: Attrs, q_SRQD: Tensor, page_table_SP: Tensor, context_S: Tensor, cache: Tensor
) -> Tensor:
    """All sequences at once: keys beyond the end of a shorter one are masked.

    What lies there may be NaN of a request that has failed, and 0 * NaN is not 0: it is cleared.
    """
    contexts = context_S.tolist()
    max_context = max(contexts)
    num_queries = q_SRQD.shape[0] * q_SRQD.shape[1]
    k_SKCD, v_SKCD = _gather(attrs, page_table_SP, max_context, cache, q_SRQD.dtype)
    for i, length in enumerate(contexts):
        if length < max_context:
            k_SKCD[i, :, length:] = 0
            v_SKCD[i, :, length:] = 0
    visible_S1RC = None  # one query sees all of its sequence
    if num_queries > 1:
        visible_S1RC = _visible(context_S, q_SRQD.shape[1], max_context)
    y_SQRD = F.scaled_dot_product_attention(
        q_SRQD.transpose(1, 2),
        k_SKCD,
        v_SKCD,
        visible_S1RC,
        enable_gqa=True,
    )
    return y_SQRD.transpose(1, 2).reshape(num_queries, -1)


def _visible(context_S: Tensor, query_len: int, max_context: int) -> Tensor:
    """Which tokens of its sequence each query of a decode step sees, [S, 1, R, C]."""
    queries_after_R = torch.arange(query_len - 1, -1, -1, device=context_S.device)
    seen_SR = context_S.unsqueeze(1) - queries_after_R
    position_C = torch.arange(max_context, device=context_S.device)
    return position_C < seen_SR[:, None, :, None]


def _one_sequence(
    attrs: Attrs, q_TQD: Tensor, pages_P: Tensor, length: int, cache: Tensor
) -> Tensor:
    """The new queries of one sequence, whose keys are already in the cache."""
    first = length - q_TQD.shape[0]
    k_KCD, v_KCD = _gather(attrs, pages_P, length, cache, q_TQD.dtype)
    position_C = torch.arange(length, device=cache.device)
    visible_TC = position_C[None] <= position_C[first:, None]
    q_QTD = q_TQD.transpose(0, 1)
    y = F.scaled_dot_product_attention(
        q_QTD[None],
        k_KCD[None],
        v_KCD[None],
        visible_TC,
        enable_gqa=True,
    )
    y_QTD = y[0]
    return y_QTD.transpose(0, 1).flatten(1)


def sigmoid_gate(attrs: Attrs, x_TN: Tensor, g_TN: Tensor) -> tuple[Tensor]:
    """y = x * sigmoid(g)."""
    return (x_TN * torch.sigmoid(g_TN),)
