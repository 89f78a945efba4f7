"""Mixture of experts.

Shapes: T tokens, E experts of this rank, k experts a token, H hidden, I width of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenspeed_plan.runtime.reference.dense import widen

Attrs = Mapping[str, Any]


def topk(attrs: Attrs, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over all experts, the k largest (of equals the first), divided by their sum."""
    top_k = attrs["top_k"]
    sorted_TE, order_TE = widen(logits_TE).sort(dim=-1, descending=True, stable=True)
    weights_Tk = sorted_TE[:, :top_k].softmax(-1)
    weights_Tk = weights_Tk / weights_Tk.sum(-1, keepdim=True)
    ids_Tk = order_TE[:, :top_k]
    return weights_Tk.to(logits_TE.dtype), ids_Tk.int()


def _all_at_once(attrs: Attrs, ids_Tk: Tensor) -> bool:
    """Whether one batched product over all experts of this rank is less work than a product for each that is hit."""
    return (
        attrs["num_experts"] <= ids_Tk.numel() <= 8 * attrs["num_experts"]
        and "expert_start" not in attrs
    )


def _groups(attrs: Attrs, ids_Tk: Tensor) -> Iterator[tuple[int, Tensor]]:
    """For each expert of this rank that is hit: the expert, and its flat places in [T, k]."""
    num_experts = attrs["num_experts"]
    local = ids_Tk.flatten() - int(attrs.get("expert_start", 0))
    order = local.argsort(stable=True)
    group = local.clamp(-1, num_experts) + 1  # the first and the last are other ranks' experts
    counts = torch.bincount(group, minlength=num_experts + 2).tolist()
    start = counts[0]
    for expert in range(num_experts):
        end = start + counts[expert + 1]
        if end > start:
            yield expert, order[start:end]
        start = end


def experts_up(attrs: Attrs, x_TH: Tensor, ids_Tk: Tensor, w_EIH: Tensor) -> tuple[Tensor]:
    """y[t, j] = silu(x G^T) * (x U^T) of expert ids[t, j]; zeros where the expert is another rank's."""
    num_tokens, chosen = ids_Tk.shape
    if _all_at_once(attrs, ids_Tk):
        both_ETI = x_TH @ w_EIH.mT
        token_T1 = torch.arange(num_tokens, device=ids_Tk.device)[:, None]
        gate, up = both_ETI[ids_Tk, token_T1].chunk(2, -1)
        return ((F.silu(gate) * up).view(num_tokens, -1),)
    out = x_TH.new_zeros(num_tokens * chosen, w_EIH.shape[1] // 2)
    for expert, places in _groups(attrs, ids_Tk):
        gate, up = F.linear(x_TH[places // chosen], w_EIH[expert]).chunk(2, -1)
        out[places] = F.silu(gate) * up
    return (out.view(num_tokens, -1),)


def experts_down(
    attrs: Attrs, h_T: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, w_EHI: Tensor
) -> tuple[Tensor]:
    """y[t] = sum over j of weights[t, j] h[t, j] D^T."""
    num_tokens, chosen = ids_Tk.shape
    h = h_T.view(num_tokens, chosen, -1)
    if _all_at_once(attrs, ids_Tk):
        spread_ETI = h.new_zeros(w_EHI.shape[0], num_tokens, h.shape[2])
        token_T1 = torch.arange(num_tokens, device=ids_Tk.device)[:, None]
        spread_ETI[ids_Tk, token_T1] = h * weights_Tk[:, :, None]
        return ((spread_ETI @ w_EHI.mT).sum(0),)
    out = h.new_zeros(num_tokens * chosen, w_EHI.shape[1])
    flat = h.flatten(0, 1)
    for expert, places in _groups(attrs, ids_Tk):
        out[places] = F.linear(flat[places], w_EHI[expert])
    return ((out.view(num_tokens, chosen, -1) * weights_Tk[:, :, None]).sum(1),)


def expert_sort(attrs: Attrs, ids_Tk: Tensor) -> tuple[Tensor, Tensor]:
    """Flat places [T, k] ordered by expert (stable), those of other ranks last; bounds [E + 1] of the groups."""
    experts = attrs["num_experts"]
    local = ids_Tk.flatten() - int(attrs.get("expert_start", 0))
    group = local.where((local >= 0) & (local < experts), experts)
    counts = torch.bincount(group, minlength=experts + 1)[:experts]
    bounds = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return group.argsort(stable=True).view(ids_Tk.shape).int(), bounds.int()


def _runs(order_Tk: Tensor, bounds: Tensor) -> Iterator[tuple[int, Tensor]]:
    """For each expert that is hit: the expert, and its flat places."""
    order, ends = order_Tk.flatten().long(), bounds.tolist()
    for expert, (start, end) in enumerate(pairwise(ends)):
        if end > start:
            yield expert, order[start:end]


def grouped_up(
    attrs: Attrs, x_TH: Tensor, order_Tk: Tensor, bounds: Tensor, w_EIH: Tensor
) -> tuple[Tensor]:
    """`experts_up` from sorted places."""
    chosen = order_Tk.shape[1]
    out = x_TH.new_zeros(order_Tk.numel(), w_EIH.shape[1] // 2)
    for expert, places in _runs(order_Tk, bounds):
        gate, up = F.linear(x_TH[places // chosen], w_EIH[expert]).chunk(2, -1)
        out[places] = F.silu(gate) * up
    return (out.view(order_Tk.shape[0], -1),)


def grouped_down(
    attrs: Attrs, h_T: Tensor, order_Tk: Tensor, bounds: Tensor, w_EHI: Tensor
) -> tuple[Tensor]:
    """y[t, j] = h[t, j] D^T of its expert; zeros where that is another rank's."""
    flat = h_T.reshape(order_Tk.numel(), -1)
    out = flat.new_zeros(order_Tk.numel(), w_EHI.shape[1])
    for expert, places in _runs(order_Tk, bounds):
        out[places] = F.linear(flat[places], w_EHI[expert])
    return (out.view(order_Tk.shape[0], -1),)


def expert_sum(attrs: Attrs, d_T: Tensor, weights_Tk: Tensor) -> tuple[Tensor]:
    """y[t] = sum over j of weights[t, j] d[t, j]."""
    d_TkH = d_T.view(*weights_Tk.shape, -1)
    return ((d_TkH * weights_Tk[:, :, None]).sum(1),)


def gated_add(attrs: Attrs, x_TH: Tensor, r_TH: Tensor, g_T1: Tensor) -> tuple[Tensor]:
    """y = r + x * sigmoid(g)."""
    return (r_TH + x_TH * torch.sigmoid(g_T1),)
