"""Gated DeltaNet (arXiv:2412.06464): causal convolution, delta rule, gated norm.

A state tensor has one entry for each state slot. `src` slots hold the states before a step, `dst`
slots take those after it. In a decode step each query leaves its state in a slot of its own; in a
prefill step the last token of a sequence does, in the sequence's first slot. In mode `RECOMPUTED`
`recompute_state` has already left the state before the step in the first `dst` slot, and nothing is
written. A delta rule's state may be stored in bf16: it is computed in fp32, and rounded as it is
written.

Shapes: T tokens, S sequences, R queries of a sequence, C channels, K taps of the convolution, J =
K - 1, A key heads, B value heads, k and v their sizes, N inputs kept for each slot, E entries of a
ring in all slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenspeed_plan.plans.ops import L2_EPS, RECOMPUTED
from tokenspeed_plan.runtime.reference.delta_chunks import (
    DeltaInputs,
    by_key_head,
    by_value_head,
    chunked,
    dst_slots,
)
from tokenspeed_plan.runtime.reference.dense import normalize, widen
from tokenspeed_plan.runtime.reference.ragged import Ragged

Attrs = Mapping[str, Any]


def causal_conv(
    attrs: Attrs,
    x_TC: Tensor,
    cu_seqlens: Tensor,
    src_S: Tensor,
    dst_SR: Tensor,
    w_C1K: Tensor,
    state: Tensor,
) -> tuple[Tensor]:
    """y[t] = silu(sum_j w[j] x[t - K + 1 + j]).

    The state [slots, J, C] holds the last J inputs of a sequence, the oldest first.
    """
    w_CK = w_C1K[:, 0]
    dst_SR = dst_slots(dst_SR)
    before_SJC = _state_before(attrs, state, src_S, dst_SR)
    if attrs["mode"] == "varlen":
        y_TC, state[dst_SR[:, 0]] = _conv_ragged(x_TC, cu_seqlens, before_SJC, w_CK)
        return (y_TC,)
    x_SRC = x_TC.view(len(src_S), -1, x_TC.shape[1])
    windows_SRKC = _windows(before_SJC, x_SRC)
    if attrs["mode"] == "update":
        for i in range(windows_SRKC.shape[1]):
            state[dst_SR[:, i]] = windows_SRKC[:, i, 1:]
    return (_convolved(windows_SRKC, w_CK),)


def ring_conv(
    attrs: Attrs,
    x_TC: Tensor,
    cu_seqlens: Tensor,
    src_S: Tensor,
    dst_S: Tensor,
    context_S: Tensor,
    w_C1K: Tensor,
    state: Tensor,
) -> tuple[Tensor]:
    """`causal_conv` with a state [slots, K, C] whose entry p % K is the input at position p.

    A step may write the slot that it reads: a token reads the entries of the K - 1 positions before
    its own, and writes the one that is left.
    """
    w_CK = w_C1K.squeeze(1)
    src_S1, dst_S1 = src_S.unsqueeze(1), dst_S.unsqueeze(1)
    after_SK = _ring_before(context_S, state)
    if attrs["mode"] == "update":  # the oldest entry makes room for the new input
        windows_SKC = state[src_S1, after_SK]
        windows_SKC[:, -1] = x_TC
        state[dst_S1, after_SK[:, 1:]] = windows_SKC[:, 1:]
        return (_convolved(windows_SKC.unsqueeze(1), w_CK),)
    before_SK = _ring_before(context_S - cu_seqlens.diff(), state)
    before_SJC = state[src_S1, before_SK[:, 1:]]
    y_TC, state[dst_S1, after_SK[:, 1:]] = _conv_ragged(x_TC, cu_seqlens, before_SJC, w_CK)
    return (y_TC,)


def _ring_before(position_S: Tensor, state: Tensor) -> Tensor:
    """The entries [S, K] of the K positions before one, the oldest first."""
    num_taps = state.shape[1]
    return (position_S.unsqueeze(1) + _numbers(num_taps, position_S.device)) % num_taps


@lru_cache(maxsize=8)
def _numbers(count: int, device: torch.device) -> Tensor:
    """0, 1, ... for all layers and steps."""
    return torch.arange(count, device=device)


def _state_before(attrs: Attrs, state: Tensor, src_S: Tensor, dst_SR: Tensor) -> Tensor:
    """The state of each sequence before the step."""
    slots_S = src_S
    if attrs["mode"] == RECOMPUTED:
        slots_S = dst_SR[:, 0]
    return state.index_select(0, slots_S)


def _conv_ragged(
    x_TC: Tensor, cu_seqlens: Tensor, before_SJC: Tensor, w_CK: Tensor
) -> tuple[Tensor, Tensor]:
    """Convolve whole sequences; gives the outputs [T, C], and each one's last inputs [S, J, C]."""
    ragged = Ragged(cu_seqlens)
    x = torch.cat((before_SJC, ragged.pad(x_TC)), 1)  # [S, J + L, C]
    last_SJC = x[:, ragged.padded_len :]
    if not ragged.is_even:
        last_SJC = _inputs_from(x, cu_seqlens.diff(), before_SJC.shape[1])
    first_C, *others_KC = w_CK.unbind(1)
    y_SLC = x[:, : ragged.padded_len] * first_C
    for tap, w_C in enumerate(others_KC, start=1):
        y_SLC.addcmul_(x[:, tap : tap + ragged.padded_len], w_C)
    y_TC = ragged.pack(y_SLC)
    return F.silu(y_TC), last_SJC


def _inputs_from(x: Tensor, start_S: Tensor, count: int) -> Tensor:
    """`count` inputs of each sequence of x [S, L, C], from `start` on."""
    number = torch.arange(count, device=x.device)
    place = start_S.unsqueeze(1) + number
    return x.take_along_dim(place.unsqueeze(2), 1)


def _windows(before_SJC: Tensor, x_SRC: Tensor) -> Tensor:
    """The K inputs that each query sees: its own is the last one, [S, R, K, C]."""
    inputs = torch.cat((before_SJC, x_SRC), 1)
    num_taps = before_SJC.shape[1] + 1
    windows_SRCK = inputs.unfold(1, num_taps, 1)
    return windows_SRCK.transpose(2, 3)


def _convolved(windows_SRKC: Tensor, w_CK: Tensor) -> Tensor:
    """The convolution at each query, [S * R, C]."""
    products_SRKC = windows_SRKC * w_CK.T.contiguous()  # in the order of the inputs
    y_SRC = F.silu(products_SRKC.sum(2))
    return y_SRC.flatten(0, 1)


def qk_l2_norm(attrs: Attrs, x_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q = q / |q| / sqrt(k), k = k / |k|, each head by itself; v as it is."""
    num_tokens, key_dim = x_TC.shape[0], attrs["key_dim"]
    num_columns = 2 * attrs["num_k_heads"] * key_dim
    qk_T2Ak = widen(x_TC[:, :num_columns]).view(num_tokens, 2, -1, key_dim)
    total_T2A1 = qk_T2Ak.square().sum(-1, keepdim=True)
    q_TAk, k_TAk = (qk_T2Ak * torch.rsqrt(total_T2A1 + L2_EPS)).unbind(1)
    q_TAk = q_TAk * key_dim**-0.5
    v_T = x_TC[:, num_columns:]
    return q_TAk.flatten(1).to(x_TC.dtype), k_TAk.flatten(1).to(x_TC.dtype), v_T


def delta_gates(
    attrs: Attrs, b_TB: Tensor, a_TB: Tensor, a_log_B: Tensor, dt_bias_B: Tensor
) -> tuple[Tensor, Tensor]:
    """beta = sigmoid(b) in (0, 1); log_decay = -exp(a_log) softplus(a + dt_bias) <= 0."""
    beta_TB = widen(torch.sigmoid(b_TB))
    rate_B = -a_log_B.exp()
    time_TB = F.softplus(widen(a_TB) + dt_bias_B)
    return beta_TB, rate_B * time_TB


def delta_rule(
    attrs: Attrs,
    q_T: Tensor,
    k_T: Tensor,
    v_T: Tensor,
    beta_TB: Tensor,
    decay_TB: Tensor,
    cu_seqlens: Tensor,
    src_S: Tensor,
    dst_SR: Tensor,
    state: Tensor,
) -> tuple[Tensor]:
    """S = e^g S; S += k (beta (v - S^T k))^T; y = S^T q, for each value head.

    The state is [slots, B, k, v].
    """
    inputs = DeltaInputs(
        by_key_head(attrs, q_T),
        by_key_head(attrs, k_T),
        by_value_head(attrs, v_T),
        beta_TB,
        decay_TB,
    )
    dst_SR = dst_slots(dst_SR)
    before = widen(_state_before(attrs, state, src_S, dst_SR))
    if attrs["mode"] == "chunked":
        y_TBv, after = chunked(inputs, cu_seqlens, before)
        state[dst_SR[:, 0]] = after.to(state.dtype)
        return (y_TBv.flatten(1).to(v_T.dtype),)
    ys = []
    for i, query in enumerate(inputs.queries(before.shape[0])):
        y_SBv, before = _recurrent(query, before)
        if attrs["mode"] == "recurrent":
            state[dst_SR[:, i]] = before.to(state.dtype)
        ys.append(y_SBv)
    y_SRBv = torch.stack(ys, 1)
    return (y_SRBv.view(v_T.shape[0], -1).to(v_T.dtype),)


def _recurrent(inputs: DeltaInputs, state_SBkv: Tensor) -> tuple[Tensor, Tensor]:
    """One token of each sequence: decay, correct by the error against the decayed state, read.

    Returns:
        The output, [S, B, v], and the new state.
    """
    q_SBk, k_SBk, v_SBv, beta_SB, decay_SB = inputs
    shape_SB11 = (*beta_SB.shape, 1, 1)
    after_SBkv = state_SBkv * decay_SB.exp().view(shape_SB11)
    error_SB1v = v_SBv.unsqueeze(-2) - k_SBk.unsqueeze(-2) @ after_SBkv
    u_SB1v = error_SB1v * beta_SB.view(shape_SB11)
    after_SBkv.addcmul_(k_SBk.unsqueeze(-1), u_SB1v)  # in place: a copy takes as long
    y_SB1v = q_SBk.unsqueeze(-2) @ after_SBkv
    return y_SB1v.squeeze(-2), after_SBkv


def recompute_state(
    attrs: Attrs,
    x_TC: Tensor,
    b_TB: Tensor,
    a_TB: Tensor,
    context_S: Tensor,
    state_lens_S: Tensor,
    src_S: Tensor,
    dst_S: Tensor,
    w_C1K: Tensor,
    a_log_B: Tensor,
    dt_bias_B: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    kept_inputs: Tensor,
    kept_gates: Tensor,
) -> tuple[()]:
    """Bring the states up to date: compute the accepted part of what the last step kept again.

    A decode step keeps its inputs (x, b and a of each query) instead of a state after each query.
    Once it is known how many of them were accepted, this many go through the layer again, from the
    state in the `src` slot. The `dst` slot then has the state before the new queries, and the new
    queries' inputs.
    """
    num_seqs = len(src_S)
    window_SJC = conv_state.index_select(0, src_S)
    inputs_SNC = kept_inputs.index_select(0, src_S)
    gates_S2NB = kept_gates.index_select(0, src_S)
    before_SBkv = widen(ssm_state.index_select(0, src_S))
    x_SRC = x_TC.unflatten(0, (num_seqs, -1))
    query_len = x_SRC.shape[1]
    pending_S = context_S - query_len - state_lens_S

    windows_SNKC = _windows(window_SJC, inputs_SNC)
    y_TC = _convolved(windows_SNKC, w_C1K[:, 0])
    b_SNB, a_SNB = gates_S2NB.unbind(1)
    beta_SNB, decay_SNB = delta_gates(attrs, b_SNB, a_SNB, a_log_B, dt_bias_B)
    queries = _kept_queries(attrs, y_TC, beta_SNB.flatten(0, 1), decay_SNB.flatten(0, 1))
    ssm_state[dst_S] = _state_after(queries, pending_S, before_SBkv).to(ssm_state.dtype)
    all_inputs = torch.cat((window_SJC, inputs_SNC), 1)
    conv_state[dst_S] = _inputs_from(all_inputs, pending_S, window_SJC.shape[1])

    kept_inputs[dst_S, :query_len] = x_SRC
    for i, gate_TB in enumerate((b_TB, a_TB)):
        gate_SRB = gate_TB.view(num_seqs, -1, gate_TB.shape[1])
        kept_gates[dst_S, i, :query_len] = gate_SRB
    return ()


def _kept_queries(attrs: Attrs, y_TC: Tensor, beta_TB: Tensor, decay_TB: Tensor) -> DeltaInputs:
    """The kept inputs as the delta rule reads them, [S * N, B, ...]."""
    q_T, k_T, v_T = qk_l2_norm(attrs, y_TC)
    return DeltaInputs(
        by_key_head(attrs, q_T),
        by_key_head(attrs, k_T),
        by_value_head(attrs, v_T),
        beta_TB,
        decay_TB,
    )


def _state_after(queries: DeltaInputs, count_S: Tensor, state_SBkv: Tensor) -> Tensor:
    """The state after the first `count` queries of each sequence."""
    for i, query in enumerate(queries.queries(state_SBkv.shape[0])):
        _, after_SBkv = _recurrent(query, state_SBkv)
        is_counted_S111 = (i < count_S).view(-1, 1, 1, 1)
        state_SBkv = after_SBkv.where(is_counted_S111, state_SBkv)
    return state_SBkv


def commit_state_len(attrs: Attrs, context_lens_S: Tensor, state_lens_S: Tensor) -> tuple[()]:
    """The states that `recompute_state` left are those before the queries of this step."""
    query_len = attrs.get("query_len", 1)
    state_lens_S.copy_(context_lens_S - query_len)
    return ()


def gated_norm(attrs: Attrs, x_TN: Tensor, z_TN: Tensor, w_D: Tensor) -> tuple[Tensor]:
    """y = x / sqrt(mean(x^2) + eps) * w * silu(z) of each head: first the norm, then the gate.

    N = heads * D; the weight is the factor itself, not an offset from one.
    """
    shape = (-1, attrs["num_heads"], attrs["head_dim"])
    weighted = normalize(x_TN.view(shape), attrs["eps"]) * w_D
    y = weighted * F.silu(widen(z_TN.view(shape)))
    y_TN = y.to(x_TN.dtype).flatten(1)
    return (y_TN,)
