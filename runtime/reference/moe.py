"""Mixture of experts.

A choice is one of a token's k experts; its number is `token * k + place`. A rank may hold only the
experts from `expert_start` on; the others' outputs are zero here, and ranks add theirs up.

Shapes: T tokens, E experts of this rank, k experts of a token, H hidden, I width of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenspeed_plan.runtime.reference.dense import widen

Attrs = Mapping[str, Any]


def topk(attrs: Attrs, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over all experts, the k largest of it (of equals the first), divided by their sum.

    That is the softmax of the k largest logits.
    """
    top_k = attrs["top_k"]
    wide_TE = widen(logits_TE)
    sorted_TE, order_TE = wide_TE.sort(dim=-1, descending=True, stable=True)
    weights_Tk = sorted_TE[:, :top_k].softmax(-1)
    ids_Tk = order_TE[:, :top_k]
    return weights_Tk.to(logits_TE.dtype), ids_Tk.int()


def _is_few(attrs: Attrs, ids_Tk: Tensor) -> bool:
    """Whether choices are computed one by one: sorting so few would take longer."""
    return "expert_start" not in attrs and ids_Tk.numel() <= attrs["num_experts"]


def experts_up(attrs: Attrs, x_TH: Tensor, ids_Tk: Tensor, w_EIH: Tensor) -> tuple[Tensor]:
    """y[t, j] = silu(x G^T) * (x U^T) of expert ids[t, j], with the weight w = [G | U]."""
    if not _is_few(attrs, ids_Tk):
        return grouped_up(attrs, x_TH, *expert_sort(attrs, ids_Tk), w_EIH)
    chosen = zip(x_TH.unbind(), ids_Tk.tolist(), strict=True)
    rows = [F.linear(x_H, w_EIH[expert]) for x_H, experts in chosen for expert in experts]
    return (_swiglu(torch.stack(rows)).view(len(x_TH), -1),)


def _swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up, where x = [gate | up]."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def experts_down(
    attrs: Attrs, h_T: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, w_EHI: Tensor
) -> tuple[Tensor]:
    """y[t] = sum over j of weights[t, j] h[t, j] D^T."""
    if not _is_few(attrs, ids_Tk):
        (d_T,) = grouped_down(attrs, h_T, *expert_sort(attrs, ids_Tk), w_EHI)
        return expert_sum(attrs, d_T, weights_Tk)
    h_I = h_T.reshape(ids_Tk.numel(), -1).unbind()
    experts = ids_Tk.flatten().tolist()
    rows = [F.linear(h, w_EHI[expert]) for h, expert in zip(h_I, experts, strict=True)]
    return expert_sum(attrs, torch.stack(rows), weights_Tk)


def expert_sort(attrs: Attrs, ids_Tk: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of all choices, sorted by expert.

    Returns:
        The choices, [T, k]: those of one expert in their own order, those of other ranks last; and
        where each expert's begin, and the last one's end, [E + 1].
    """
    group, order = _group(attrs, ids_Tk).sort(stable=True)
    experts = torch.arange(attrs["num_experts"] + 1, device=group.device, dtype=group.dtype)
    bounds = torch.searchsorted(group, experts, out_int32=True)
    return order.view(ids_Tk.shape).int(), bounds


def _group(attrs: Attrs, ids_Tk: Tensor) -> Tensor:
    """Expert of each choice, counted from the first of this rank, [T * k]; E is another rank's."""
    expert = ids_Tk.flatten()
    if "expert_start" not in attrs:
        return expert
    local = expert - int(attrs["expert_start"])
    is_here = (local >= 0) & (local < attrs["num_experts"])
    return local.where(is_here, attrs["num_experts"])


def expert_count(attrs: Attrs, ids_Tk: Tensor) -> tuple[Tensor]:
    """How often each part of the tokens chooses each expert, [parts, E + 1].

    All parts but the last have ceil(T / parts) tokens. The last column counts other ranks' experts.
    """
    num_experts, num_parts = attrs["num_experts"], attrs["num_parts"]
    group = _group(attrs, ids_Tk)
    length = -(-ids_Tk.shape[0] // num_parts) * ids_Tk.shape[1]
    part = torch.arange(group.numel(), device=group.device) // length
    bins = part * (num_experts + 1) + group
    counts = torch.bincount(bins, minlength=num_parts * (num_experts + 1))
    return (counts.view(num_parts, -1).int(),)


def expert_place(attrs: Attrs, ids_Tk: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """`expert_sort` of choices that `expert_count` has counted."""
    return expert_sort(attrs, ids_Tk)


def grouped_up(
    attrs: Attrs, x_TH: Tensor, order_Tk: Tensor, bounds: Tensor, w_EIH: Tensor
) -> tuple[Tensor]:
    """`experts_up` of sorted choices."""
    order = order_Tk.flatten()
    x = x_TH.index_select(0, order // order_Tk.shape[1])
    y = _in_place_of(order, _swiglu(_by_expert(x, bounds, w_EIH)))
    return (y.view(len(x_TH), -1),)


def grouped_down(
    attrs: Attrs, h_T: Tensor, order_Tk: Tensor, bounds: Tensor, w_EHI: Tensor
) -> tuple[Tensor]:
    """y[t, j] = h[t, j] D^T of its expert."""
    order = order_Tk.flatten()
    h = h_T.reshape(len(order), -1).index_select(0, order)
    y = _in_place_of(order, _by_expert(h, bounds, w_EHI))
    return (y.view(len(order_Tk), -1),)


def _by_expert(x: Tensor, bounds: Tensor, w_E: Tensor) -> Tensor:
    """The product of each expert with its part of sorted rows."""
    runs = enumerate(pairwise(bounds.tolist()))
    parts = [F.linear(x[start:end], w_E[e]) for e, (start, end) in runs if end > start]
    return torch.cat([x.new_empty(0, w_E.shape[1]), *parts])


def _in_place_of(order: Tensor, y_sorted: Tensor) -> Tensor:
    """Rows of choices that were sorted, by the number of the choice; zero for other ranks'."""
    y = y_sorted.new_zeros(len(order), y_sorted.shape[1])
    y[order[: len(y_sorted)]] = y_sorted
    return y


def expert_sum(attrs: Attrs, d_T: Tensor, weights_Tk: Tensor) -> tuple[Tensor]:
    """y[t] = sum over j of weights[t, j] d[t, j]."""
    d_TkH = d_T.view(*weights_Tk.shape, -1)
    weighted_TkH = d_TkH * weights_Tk.unsqueeze(-1)
    return (weighted_TkH.sum(1),)


def gated_add(attrs: Attrs, x_TH: Tensor, r_TH: Tensor, g_T1: Tensor) -> tuple[Tensor]:
    """y = r + x * sigmoid(g)."""
    return (torch.addcmul(r_TH, x_TH, torch.sigmoid(g_T1)),)
