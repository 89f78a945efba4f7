"""Mixture of experts.

A choice is one of a token's k experts; its number is `token * k + place`. A rank may hold only the
experts from `expert_start` on; the others' outputs are zero here, and ranks add theirs up.

Shapes: T tokens, E experts of this rank, k experts of a token, H hidden, I width of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenspeed_plan.runtime.reference.dense import widen

Attrs = Mapping[str, Any]
Groups = Iterator[tuple[int, Tensor]]


def topk(attrs: Attrs, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over all experts, the k largest of it (of equals the first), divided by their sum."""
    top_k = attrs["top_k"]
    wide_TE = widen(logits_TE)
    sorted_TE, order_TE = wide_TE.sort(dim=-1, descending=True, stable=True)
    logits_Tk = sorted_TE[:, :top_k]
    weights_Tk = logits_Tk.softmax(-1)
    total_T1 = weights_Tk.sum(-1, keepdim=True)
    weights_Tk = weights_Tk / total_T1
    ids_Tk = order_TE[:, :top_k]
    return weights_Tk.to(logits_TE.dtype), ids_Tk.int()


def _all_at_once(attrs: Attrs, ids_Tk: Tensor) -> bool:
    """Whether one batched product over all experts costs less than one for each that is hit."""
    num_experts: int = attrs["num_experts"]
    if "expert_start" in attrs:
        return False
    return num_experts <= ids_Tk.numel() <= 8 * num_experts


def _groups(attrs: Attrs, ids_Tk: Tensor) -> Groups:
    """For each expert of this rank that is hit: the expert, and the numbers of its choices."""
    num_experts = attrs["num_experts"]
    local = _local_ids(attrs, ids_Tk)
    order = local.argsort(stable=True)
    group = local.clamp(-1, num_experts) + 1  # the first and the last are other ranks' experts
    num_groups = num_experts + 2
    counts = torch.bincount(group, minlength=num_groups)
    num_before_and_own = counts[:-1].tolist()
    bounds = list(accumulate(num_before_and_own))
    return _cut(order, bounds)


def _cut(order: Tensor, bounds: list[int]) -> Groups:
    """Group i is from bound i to bound i + 1; groups without choices are left out."""
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            yield expert, order[start:end]


def _local_ids(attrs: Attrs, ids_Tk: Tensor) -> Tensor:
    """Expert of each choice, counted from the first of this rank: [T * k]."""
    expert_start = int(attrs.get("expert_start", 0))
    return ids_Tk.flatten() - expert_start


def experts_up(attrs: Attrs, x_TH: Tensor, ids_Tk: Tensor, w_EIH: Tensor) -> tuple[Tensor]:
    """y[t, j] = silu(x G^T) * (x U^T) of expert ids[t, j], with the weight w = [G | U]."""
    if not _all_at_once(attrs, ids_Tk):
        return (_up_by_expert(x_TH, ids_Tk, _groups(attrs, ids_Tk), w_EIH),)
    num_tokens = len(ids_Tk)
    all_ETI = x_TH @ w_EIH.mT
    chosen_TkI = all_ETI[ids_Tk, _token_numbers(ids_Tk)]
    y_TkI = _swiglu(chosen_TkI)
    return (y_TkI.view(num_tokens, -1),)


def _token_numbers(ids_Tk: Tensor) -> Tensor:
    """0 to T - 1, [T, 1]."""
    num_tokens = len(ids_Tk)
    token_T = torch.arange(num_tokens, device=ids_Tk.device)
    return token_T.unsqueeze(1)


def _swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up, where x = [gate | up]."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def _up_by_expert(x_TH: Tensor, choices_Tk: Tensor, groups: Groups, w_EIH: Tensor) -> Tensor:
    """One product for each expert that is hit, [T, k * I]."""
    num_tokens, top_k = choices_Tk.shape
    num_choices = num_tokens * top_k
    width = w_EIH.shape[1] // 2
    y = x_TH.new_zeros(num_choices, width)
    for expert, choices in groups:
        tokens = choices // top_k
        x = x_TH[tokens]
        gate_up = F.linear(x, w_EIH[expert])
        y[choices] = _swiglu(gate_up)
    return y.view(num_tokens, -1)


def experts_down(
    attrs: Attrs, h_T: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, w_EHI: Tensor
) -> tuple[Tensor]:
    """y[t] = sum over j of weights[t, j] h[t, j] D^T."""
    num_tokens, top_k = ids_Tk.shape
    h_TkI = h_T.view(num_tokens, top_k, -1)
    if not _all_at_once(attrs, ids_Tk):
        groups = _groups(attrs, ids_Tk)
        d_T = _down_by_expert(h_TkI, groups, w_EHI)
        return expert_sum(attrs, d_T, weights_Tk)
    num_experts, _, width = w_EHI.shape
    spread_ETI = h_TkI.new_zeros(num_experts, num_tokens, width)
    weights_Tk1 = weights_Tk.unsqueeze(-1)
    spread_ETI[ids_Tk, _token_numbers(ids_Tk)] = h_TkI * weights_Tk1
    all_ETH = spread_ETI @ w_EHI.mT
    return (all_ETH.sum(0),)


def _down_by_expert(h_TkI: Tensor, groups: Groups, w_EHI: Tensor) -> Tensor:
    """One product for each expert that is hit, [T, k * H]."""
    num_tokens = len(h_TkI)
    hidden_size = w_EHI.shape[1]
    h = h_TkI.flatten(0, 1)
    d = h.new_zeros(len(h), hidden_size)
    for expert, choices in groups:
        w_HI = w_EHI[expert]
        d[choices] = F.linear(h[choices], w_HI)
    return d.view(num_tokens, -1)


def expert_sort(attrs: Attrs, ids_Tk: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of all choices, sorted by expert.

    Returns:
        The choices, [T, k]: those of one expert in their own order, those of other ranks last; and
        where each expert's begin, and the last one's end, [E + 1].
    """
    num_experts = attrs["num_experts"]
    local = _local_ids(attrs, ids_Tk)
    is_here = (local >= 0) & (local < num_experts)
    group = local.where(is_here, num_experts)
    counts = torch.bincount(group, minlength=num_experts + 1)
    own_counts = counts[:num_experts]
    ends = own_counts.cumsum(0)
    first = ends.new_zeros(1)
    bounds = torch.cat((first, ends))
    order = group.argsort(stable=True)
    return order.view(ids_Tk.shape).int(), bounds.int()


def expert_count(attrs: Attrs, ids_Tk: Tensor) -> tuple[Tensor]:
    """How often each part of the tokens chooses each expert, [parts, E + 1].

    All parts but the last have ceil(T / parts) tokens. The last column counts other ranks' experts.
    """
    num_experts, num_parts = attrs["num_experts"], attrs["num_parts"]
    local = _local_ids(attrs, ids_Tk)
    is_here = (local >= 0) & (local < num_experts)
    group = local.where(is_here, num_experts)
    length = -(-ids_Tk.shape[0] // num_parts) * ids_Tk.shape[1]
    part = torch.arange(group.numel(), device=group.device) // length
    bins = part * (num_experts + 1) + group.flatten()
    counts = torch.bincount(bins, minlength=num_parts * (num_experts + 1))
    return (counts.view(num_parts, -1).int(),)


def expert_place(attrs: Attrs, ids_Tk: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """`expert_sort` of choices that `expert_count` has counted."""
    return expert_sort(attrs, ids_Tk)


def _sorted_groups(order_Tk: Tensor, bounds: Tensor) -> Groups:
    """`_groups` of choices that `expert_sort` has sorted."""
    order = order_Tk.flatten().long()
    return _cut(order, bounds.tolist())


def grouped_up(
    attrs: Attrs, x_TH: Tensor, order_Tk: Tensor, bounds: Tensor, w_EIH: Tensor
) -> tuple[Tensor]:
    """`experts_up` of sorted choices."""
    groups = _sorted_groups(order_Tk, bounds)
    return (_up_by_expert(x_TH, order_Tk, groups, w_EIH),)


def grouped_down(
    attrs: Attrs, h_T: Tensor, order_Tk: Tensor, bounds: Tensor, w_EHI: Tensor
) -> tuple[Tensor]:
    """y[t, j] = h[t, j] D^T of its expert."""
    h_TkI = h_T.reshape(*order_Tk.shape, -1)
    groups = _sorted_groups(order_Tk, bounds)
    return (_down_by_expert(h_TkI, groups, w_EHI),)


def expert_sum(attrs: Attrs, d_T: Tensor, weights_Tk: Tensor) -> tuple[Tensor]:
    """y[t] = sum over j of weights[t, j] d[t, j]."""
    d_TkH = d_T.view(*weights_Tk.shape, -1)
    weights_Tk1 = weights_Tk.unsqueeze(-1)
    weighted_TkH = d_TkH * weights_Tk1
    return (weighted_TkH.sum(1),)


def gated_add(attrs: Attrs, x_TH: Tensor, r_TH: Tensor, g_T1: Tensor) -> tuple[Tensor]:
    """y = r + x * sigmoid(g)."""
    return (r_TH + x_TH * torch.sigmoid(g_T1),)
