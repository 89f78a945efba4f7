"""Gated DeltaNet (arXiv:2412.06464): causal convolution, delta rule, gated norm.

Shapes: T tokens, S sequences, L longest sequence of the batch, C channels, K taps, A key heads, B
value heads, dk and dv their sizes, c a chunk of 64 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenspeed_plan.plans.ops import DELTA_CHUNK, L2_EPS, RECOMPUTED
from tokenspeed_plan.runtime.execution.arenas import TORCH_DTYPES as DTYPES
from tokenspeed_plan.runtime.reference.dense import normalize, widen

Attrs = Mapping[str, Any]


class Ragged:
    """The rows of several sequences, laid out one sequence a row and padded with zeros."""

    def __init__(self, cu_seqlens: Tensor, multiple: int = 1) -> None:
        bounds = cu_seqlens.long()
        self.lengths_S = bounds[1:] - bounds[:-1]
        longest = -(-int(self.lengths_S.max()) // multiple) * multiple
        place_L = torch.arange(longest, device=bounds.device)
        self.valid_SL = place_L[None] < self.lengths_S[:, None]
        self.rows_SL = (bounds[:-1, None] + place_L[None]).where(self.valid_SL, 0)

    def pad(self, x_T: Tensor) -> Tensor:
        """[T, ...] -> [S, L, ...]."""
        x = x_T[self.rows_SL]
        return x * self.valid_SL.reshape(*self.valid_SL.shape, *[1] * (x.dim() - 2))

    def pack(self, x_SL: Tensor) -> Tensor:
        """[S, L, ...] -> [T, ...]."""
        return x_SL[self.valid_SL]


def causal_conv(
    attrs: Attrs,
    x_TC: Tensor,
    cu_seqlens: Tensor,
    read_S: Tensor,
    write_SR: Tensor,
    w: Tensor,
    state: Tensor,
) -> tuple[Tensor]:
    """y[t] = silu(sum_j w[j] x[t - K + 1 + j]); the state holds the last K - 1 inputs of a sequence, oldest first.

    In a decode step each of a sequence's rows leaves the state after it; else the last one does, in
    the first row.
    """
    taps, w_CK, write_SR = attrs["kernel_size"], w[:, 0], _rows(write_SR)
    before = state.index_select(0, write_SR[:, 0] if attrs["mode"] == RECOMPUTED else read_S)
    if attrs["mode"] != "varlen":
        windows = _windows(before, x_TC.unflatten(0, (len(before), -1)))
        for i in range(windows.shape[1] if attrs["mode"] == "update" else 0):
            state[write_SR[:, i]] = windows[:, i, 1:]
        return (_convolved(windows, w_CK),)
    ragged = Ragged(cu_seqlens)
    x = torch.cat((before, ragged.pad(x_TC)), 1)  # [S, K - 1 + L, C]
    last = ragged.lengths_S[:, None] + torch.arange(taps - 1, device=x.device)
    state[write_SR[:, 0]] = x.gather(1, last[:, :, None].expand(-1, -1, x.shape[2]))
    length = x.shape[1] - taps + 1
    y = sum(x[:, j : j + length] * w_CK[:, j] for j in range(taps))
    assert isinstance(y, Tensor)
    return (F.silu(ragged.pack(y)),)


def _windows(before: Tensor, x_SRC: Tensor) -> Tensor:
    """The inputs that each of a sequence's rows sees, from those before it: [S, R, K, C]."""
    return torch.cat((before, x_SRC), 1).unfold(1, before.shape[1] + 1, 1).transpose(2, 3)


def _convolved(windows_SRKC: Tensor, w_CK: Tensor) -> Tensor:
    return F.silu((windows_SRKC * w_CK.T).sum(2)).flatten(0, 1)


def qk_l2_norm(attrs: Attrs, x_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q = q / |q| / sqrt(dk), k = k / |k|, each head by itself; v as it is."""
    key = attrs["num_k_heads"] * attrs["key_dim"]
    q, k, v = x_TC.split((key, key, x_TC.shape[1] - 2 * key), -1)
    heads = (attrs["num_k_heads"], attrs["key_dim"])
    q, k = (_l2_norm(widen(part.unflatten(-1, heads))) for part in (q, k))
    return (q * attrs["key_dim"] ** -0.5).flatten(1).to(v.dtype), k.flatten(1).to(v.dtype), v


def _l2_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def delta_gates(
    attrs: Attrs, b_TB: Tensor, a_TB: Tensor, a_log_B: Tensor, dt_bias_B: Tensor
) -> tuple[Tensor, Tensor]:
    """beta = sigmoid(b) in (0, 1); log_decay = -exp(a_log) softplus(a + dt_bias) <= 0."""
    return widen(torch.sigmoid(b_TB)), -a_log_B.exp() * F.softplus(widen(a_TB) + dt_bias_B)


def delta_rule(
    attrs: Attrs,
    q_T: Tensor,
    k_T: Tensor,
    v_T: Tensor,
    beta_TB: Tensor,
    decay_TB: Tensor,
    cu_seqlens: Tensor,
    read_S: Tensor,
    write_SR: Tensor,
    state: Tensor,
) -> tuple[Tensor]:
    """S = e^g S; S += k (beta (v - S^T k))^T; y = S^T q, per value head; the state is [rows, B, dk, dv].

    In a decode step each of a sequence's rows leaves the state after it; else the last one does, in
    the first row.
    """
    q, k, v = _as_heads(attrs, q_T, k_T, v_T)
    write_SR = _rows(write_SR)
    before = state.index_select(0, write_SR[:, 0] if attrs["mode"] == RECOMPUTED else read_S)
    if attrs["mode"] != "chunked":
        rows = tuple(x.unflatten(0, (len(before), -1)) for x in (q, k, v, beta_TB, decay_TB))
        ys = []
        for i in range(rows[0].shape[1]):
            y, before = _recurrent(*(x[:, i] for x in rows), before)  # type: ignore[call-arg]
            if attrs["mode"] == "recurrent":
                state[write_SR[:, i]] = before
            ys.append(y)
        return (torch.stack(ys, 1).flatten(0, 1).flatten(1).to(v_T.dtype),)
    ragged = Ragged(cu_seqlens, DELTA_CHUNK)
    padded = tuple(ragged.pad(x).transpose(1, 2) for x in (q, k, v, beta_TB, decay_TB))
    y, state[write_SR[:, 0]] = _chunked(padded, before)
    return (ragged.pack(y.transpose(1, 2)).flatten(1).to(v_T.dtype),)


def recompute_state(
    attrs: Attrs,
    x_TC: Tensor,
    b_TB: Tensor,
    a_TB: Tensor,
    context_S: Tensor,
    state_lens_S: Tensor,
    read_S: Tensor,
    write_S: Tensor,
    w: Tensor,
    a_log_B: Tensor,
    dt_bias_B: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    kept_inputs: Tensor,
    kept_gates: Tensor,
) -> tuple[()]:
    """Bring states up to date: what was kept of the last step goes through the layer again, as far as it came true.

    The states are then those before the new rows, in the row to write, and what is kept there is of
    the new rows.
    """
    window, state, inputs, gates = (
        x.index_select(0, read_S) for x in (conv_state, ssm_state, kept_inputs, kept_gates)
    )
    new_SRC = x_TC.unflatten(0, (len(read_S), -1))
    pending_S = context_S - new_SRC.shape[1] - state_lens_S
    y = _convolved(_windows(window, inputs), w[:, 0])
    q, k, v = (x.unflatten(0, inputs.shape[:2]) for x in _as_heads(attrs, *qk_l2_norm(attrs, y)))
    beta, decay = delta_gates(attrs, gates[:, 0], gates[:, 1], a_log_B, dt_bias_B)
    for i in range(inputs.shape[1]):
        _, after = _recurrent(q[:, i], k[:, i], v[:, i], beta[:, i], decay[:, i], state)
        state = after.where((i < pending_S)[:, None, None, None], state)
    last = pending_S[:, None] + torch.arange(window.shape[1], device=window.device)
    ssm_state[write_S] = state
    conv_state[write_S] = torch.cat((window, inputs), 1).gather(
        1, last[:, :, None].expand_as(window)
    )
    kept_inputs[write_S, : new_SRC.shape[1]] = new_SRC
    for i, gate_TB in enumerate((b_TB, a_TB)):
        kept_gates[write_S, i, : new_SRC.shape[1]] = gate_TB.view(len(read_S), -1, gate_TB.shape[1])
    return ()


def commit_state_len(attrs: Attrs, context_lens_S: Tensor, state_lens_S: Tensor) -> tuple[()]:
    """So far `recompute_state` has brought the states: to the rows of this step."""
    state_lens_S.copy_(context_lens_S - attrs.get("query_len", 1))
    return ()


def _rows(dst_state_slots: Tensor) -> Tensor:
    """Rows to write, [S, R or more]; a plan that does not speculate has one a sequence."""
    return dst_state_slots.long().view(len(dst_state_slots), -1)


def _as_heads(attrs: Attrs, q_T: Tensor, k_T: Tensor, v_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[T, B, k], [T, B, k] and [T, B, v]."""
    heads, group = attrs["num_k_heads"], attrs["num_v_heads"] // attrs["num_k_heads"]
    q, k = (_shared(widen(x).unflatten(-1, (heads, -1)), group) for x in (q_T, k_T))
    return q, k, widen(v_T).unflatten(-1, (attrs["num_v_heads"], -1))


def _shared(x_TAk: Tensor, group: int) -> Tensor:
    """Value head b uses key head b // group."""
    return x_TAk[:, :, None].expand(-1, -1, group, -1).flatten(1, 2)


def _recurrent(
    q_SBk: Tensor,
    k_SBk: Tensor,
    v_SBv: Tensor,
    beta_SB: Tensor,
    decay_SB: Tensor,
    state_SBkv: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token a sequence: decay first, error against the decayed state, read after the update.

    k and q meet the old state in one product: S'^T q = a S^T q + (k . q) u with a the decay and u
    the update.
    """
    decay = decay_SB.exp()[..., None]
    from_k, from_q = (torch.stack((k_SBk, q_SBk), -2) @ state_SBkv * decay[..., None]).unbind(-2)
    u_SBv = beta_SB[..., None] * (v_SBv - from_k)
    state = torch.addcmul(state_SBkv * decay[..., None], k_SBk[..., None], u_SBv[..., None, :])
    return from_q + (k_SBk * q_SBk).sum(-1, keepdim=True) * u_SBv, state


def _chunked(sequences: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, Tensor]:
    """q, k, v, beta, log decay of whole sequences [S, B, L, ...], chunk by chunk; zero rows at the end change nothing.

    `_solve` prepares all chunks at once, `_scan` carries the state through them.
    """
    q, k, v, beta, decay = (_in_chunks(x) for x in sequences)
    u, w, mix, total = _solve(q, k, v, beta, decay)
    y, state = _scan(q, k, u, w, mix, total, state)
    return y.flatten(2, 3), state


def _in_chunks(x: Tensor) -> Tensor:
    """[S, B, L, ...] -> [S, B, N, c, ...]."""
    chunks: Tensor = x.unflatten(2, (-1, DELTA_CHUNK))
    return chunks


def _ratio(total: Tensor) -> Tensor:
    """D[i, j] = exp(G[i] - G[j]) for i >= j, else 0, with G the running sum of the log decay in a chunk."""
    gap = total[..., :, None] - total[..., None, :]
    later = torch.ones(gap.shape[-2:], dtype=torch.bool, device=gap.device).triu(1)
    return gap.masked_fill(later, float("-inf")).exp()


def _solve(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u = A^-1 beta V, w = A^-1 beta e^G K, (Q K^T) * D and G, with A = I + strict_lower((beta K K^T) * D)."""
    total = decay.cumsum(-1)
    ratio = _ratio(total)
    right = torch.cat((v * beta[..., None], k * (beta * total.exp())[..., None]), -1)
    lower = ((k * beta[..., None]) @ k.mT * ratio).tril(-1)
    solved = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    return solved[..., : v.shape[-1]], solved[..., v.shape[-1] :], q @ k.mT * ratio, total


def _scan(
    q: Tensor, k: Tensor, u: Tensor, w: Tensor, mix: Tensor, total: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """U = u - w S; Y = e^G Q S + mix U; S' = e^G_last S + (e^(G_last - G) K)^T U, chunk after chunk."""
    from_q = q * total.exp()[..., None]
    last = total[..., -1:]
    left = (k * (last - total).exp()[..., None]).mT
    out = []
    for n in range(q.shape[2]):
        added = u[:, :, n] - w[:, :, n] @ state
        out.append(from_q[:, :, n] @ state + mix[:, :, n] @ added)
        state = state * last[:, :, n, :, None].exp() + left[:, :, n] @ added
    return torch.stack(out, 2), state


def delta_chunk(
    attrs: Attrs,
    q_T: Tensor,
    k_T: Tensor,
    v_T: Tensor,
    beta_TB: Tensor,
    decay_TB: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, ...]:
    """The part of the chunked delta rule that needs no state; chunks begin anew with each sequence."""
    q, k, v = _as_heads(attrs, q_T, k_T, v_T)
    ragged = Ragged(cu_seqlens, DELTA_CHUNK)
    solved = _solve(
        *(_in_chunks(ragged.pad(x).transpose(1, 2)) for x in (q, k, v, beta_TB, decay_TB))
    )
    *made, total = (ragged.pack(x.flatten(2, 3).transpose(1, 2)) for x in solved)
    return (*(x.flatten(1).to(v_T.dtype) for x in made), total)


def delta_scan(
    attrs: Attrs,
    q_T: Tensor,
    k_T: Tensor,
    u_T: Tensor,
    w_T: Tensor,
    mix_T: Tensor,
    total_TB: Tensor,
    cu_seqlens: Tensor,
    read_S: Tensor,
    write_SR: Tensor,
    state: Tensor,
) -> tuple[Tensor]:
    """The part of the chunked delta rule that carries the state."""
    heads, group = attrs["num_k_heads"], attrs["num_v_heads"] // attrs["num_k_heads"]
    q, k = (_shared(widen(x).unflatten(-1, (heads, -1)), group) for x in (q_T, k_T))
    u, w, mix = (widen(x).unflatten(-1, (attrs["num_v_heads"], -1)) for x in (u_T, w_T, mix_T))
    ragged = Ragged(cu_seqlens, DELTA_CHUNK)
    q, k, u, w, mix = (_in_chunks(ragged.pad(x).transpose(1, 2)) for x in (q, k, u, w, mix))
    y, after = _scan(
        q, k, u, w, mix, _padded_total(ragged, total_TB), state.index_select(0, read_S)
    )
    state[_rows(write_SR)[:, 0]] = after
    return (ragged.pack(y.flatten(2, 3).transpose(1, 2)).flatten(1).to(DTYPES[attrs["dtype"]]),)


def _padded_total(ragged: Ragged, total_TB: Tensor) -> Tensor:
    """G in chunks; after a sequence's end it stays as it was (the rows there decay nothing)."""
    total = _in_chunks(ragged.pad(total_TB).transpose(1, 2))
    valid = ragged.valid_SL[:, None].unflatten(2, (-1, DELTA_CHUNK))
    held = total.masked_fill(~valid, float("inf")).cummin(-1).values
    return held.masked_fill(held.isinf(), 0.0)  # chunks that lie after the end


def gated_norm(attrs: Attrs, x_TN: Tensor, z_TN: Tensor, w_D: Tensor) -> tuple[Tensor]:
    """y = x / sqrt(mean(x^2) + eps) * w * silu(z), per head: the norm first, the weight as stored."""
    heads = (attrs["num_heads"], attrs["head_dim"])
    x, z = x_TN.unflatten(-1, heads), z_TN.unflatten(-1, heads)
    return ((normalize(x, attrs["eps"]) * w_D * F.silu(widen(z))).to(x_TN.dtype).flatten(1),)
