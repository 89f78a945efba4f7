"""The gated delta rule in chunks of 64 tokens (arXiv:2412.06464, section 3.3): for prefill.

Shorter prompts are one chunk of their own length.

Within a chunk all tokens are computed at once; the state goes from chunk to chunk. In a chunk G is
the running sum of the log decay, and D[i, j] = exp(G[i] - G[j]) for i >= j, else 0.

Shapes: T tokens, S sequences, L longest sequence of the batch, N chunks of a sequence, c tokens of
a chunk, A key heads, B value heads, k and v their sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenspeed_plan.plans.ops import DELTA_CHUNK
from tokenspeed_plan.runtime.execution.arenas import TORCH_DTYPES as DTYPES
from tokenspeed_plan.runtime.reference.dense import widen
from tokenspeed_plan.runtime.reference.ragged import Ragged

Attrs = Mapping[str, Any]


class DeltaInputs(NamedTuple):
    """What the delta rule reads for each token and value head; the first dimensions vary."""

    q: Tensor  # [..., k]
    k: Tensor  # [..., k]
    v: Tensor  # [..., v]
    beta: Tensor
    decay: Tensor  # log decay

    def each(self, function: Callable[[Tensor], Tensor]) -> DeltaInputs:
        """A function of each of the five."""
        return DeltaInputs(*map(function, self))

    def queries(self, num_seqs: int) -> Iterator[DeltaInputs]:
        """[S * R, ...] -> [S, ...]: the first query of each sequence, then the next."""
        query_len = self.q.shape[0] // num_seqs
        for first in range(query_len):
            yield DeltaInputs(*[x[first::query_len] for x in self])


class Chunks(NamedTuple):
    """All of a chunk that needs no state: what `_prepare` computes."""

    u: Tensor  # [S, B, N, c, v]
    w: Tensor  # [S, B, N, c, k]
    mix: Tensor  # [S, B, N, c, c]
    total: Tensor  # [S, B, N, c]: G


def by_key_head(attrs: Attrs, x_T: Tensor) -> Tensor:
    """[T, A * k] -> [T, B, k]: value head b uses key head b // (B / A)."""
    num_k_heads = attrs["num_k_heads"]
    group = attrs["num_v_heads"] // num_k_heads
    x_TAk = widen(x_T).view(x_T.shape[0], num_k_heads, -1)
    return x_TAk.repeat_interleave(group, 1)


def by_value_head(attrs: Attrs, x_T: Tensor) -> Tensor:
    """[T, B * v] -> [T, B, v]."""
    return widen(x_T).view(x_T.shape[0], attrs["num_v_heads"], -1)


def chunked(inputs: DeltaInputs, cu_seqlens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The delta rule over whole sequences.

    Args:
        inputs: by token, [T, B, ...].
        cu_seqlens: bounds of the sequences, [S + 1].
        state: before the first token of each sequence, [S, B, k, v].

    Returns:
        The outputs, [T, B, v], and the state after the last token of each sequence.
    """
    ragged = Ragged(cu_seqlens, DELTA_CHUNK)
    padded = inputs.each(lambda x: _in_chunks(ragged, x))
    chunks = _prepare(padded)
    y, after = _scan(padded.q, padded.k, chunks, state)
    return _packed(ragged, y), after


def _in_chunks(ragged: Ragged, x_TB: Tensor) -> Tensor:
    """[T, B, ...] -> [S, B, N, c, ...]; the zeros after a sequence's end change no state."""
    shape = (ragged.num_seqs, -1, _chunk_len(ragged), *x_TB.shape[1:])
    return ragged.pad(x_TB).view(shape).movedim(3, 1)


def _chunk_len(ragged: Ragged) -> int:
    """c: 64, or less where all sequences are shorter."""
    return min(ragged.padded_len, DELTA_CHUNK)


def _packed(ragged: Ragged, x_SBNc: Tensor) -> Tensor:
    """[S, B, N, c, ...] -> [T, B, ...]."""
    x_SLB = x_SBNc.flatten(2, 3).transpose(1, 2)
    return ragged.pack(x_SLB)


def _ratio(total: Tensor) -> Tensor:
    """D, [..., c, c]."""
    column = total.unsqueeze(-1)
    row = total.unsqueeze(-2)
    return (column - row).exp().tril()


def _prepare(inputs: DeltaInputs) -> Chunks:
    """u = M^-1 beta V, w = M^-1 beta e^G K and mix = (Q K^T) * D, for all chunks at once.

    M = I + strict_lower((beta K K^T) * D).
    """
    q, k, v, beta, decay = inputs
    total = decay.cumsum(-1)
    ratio = _ratio(total)
    beta_1 = beta.unsqueeze(-1)
    decayed_beta = beta * total.exp()
    beta_v = v * beta_1
    beta_k = k * beta_1
    decayed_k = k * decayed_beta.unsqueeze(-1)
    right = torch.cat((beta_v, decayed_k), -1)
    lower = beta_k @ k.mT * ratio
    solved = torch.linalg.solve_triangular(
        lower,
        right,
        upper=False,
        unitriangular=True,
    )
    sizes = (v.shape[-1], k.shape[-1])
    u, w = solved.split(sizes, -1)
    mix = q @ k.mT * ratio
    return Chunks(u, w, mix, total)


def _scan(q: Tensor, k: Tensor, chunks: Chunks, state: Tensor) -> tuple[Tensor, Tensor]:
    """U = u - w S; Y = e^G Q S + mix U; S' = e^G_last S + (e^(G_last - G) K)^T U, chunk by chunk.

    Returns:
        The outputs, [S, B, N, c, v], and the last state.
    """
    total = chunks.total
    last = total[..., -1:]
    decay = last.unsqueeze(-1).exp()
    remaining = (last - total).exp()
    decayed_q = q * total.exp().unsqueeze(-1)
    decayed_k = k * remaining.unsqueeze(-1)
    outputs = []
    by_chunk = (chunks.u, chunks.w, chunks.mix, decayed_q, decayed_k, decay)
    for u, w, mix, queries, keys, factor in zip(*(x.unbind(2) for x in by_chunk), strict=True):
        added = u - w @ state
        outputs.append(queries @ state + mix @ added)
        state = state * factor + keys.mT @ added
    return torch.stack(outputs, 2), state


def delta_chunk(
    attrs: Attrs,
    q_T: Tensor,
    k_T: Tensor,
    v_T: Tensor,
    beta_TB: Tensor,
    decay_TB: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, ...]:
    """The part of the chunked rule that needs no state; each sequence begins with a new chunk.

    Returns:
        u [T, B * v], w [T, B * k], mix [T, B * c] and G [T, B]: see `_prepare`.
    """
    inputs = DeltaInputs(
        by_key_head(attrs, q_T),
        by_key_head(attrs, k_T),
        by_value_head(attrs, v_T),
        beta_TB,
        decay_TB,
    )
    ragged = Ragged(cu_seqlens, DELTA_CHUNK)
    chunks = _prepare(inputs.each(lambda x: _in_chunks(ragged, x)))
    mix = F.pad(chunks.mix, (0, DELTA_CHUNK - _chunk_len(ragged)))
    outputs = []
    for x in (chunks.u, chunks.w, mix):
        x_T = _packed(ragged, x).flatten(1)
        outputs.append(x_T.to(v_T.dtype))
    return (*outputs, _packed(ragged, chunks.total))


def delta_scan(
    attrs: Attrs,
    q_T: Tensor,
    k_T: Tensor,
    u_T: Tensor,
    w_T: Tensor,
    mix_T: Tensor,
    total_TB: Tensor,
    cu_seqlens: Tensor,
    src_S: Tensor,
    dst_SR: Tensor,
    state: Tensor,
) -> tuple[Tensor]:
    """The part of the chunked rule that carries the state, from `src` slots to `dst` slots."""
    ragged = Ragged(cu_seqlens, DELTA_CHUNK)
    q = _in_chunks(ragged, by_key_head(attrs, q_T))
    k = _in_chunks(ragged, by_key_head(attrs, k_T))
    chunks = Chunks(
        _in_chunks(ragged, by_value_head(attrs, u_T)),
        _in_chunks(ragged, by_value_head(attrs, w_T)),
        _in_chunks(ragged, by_value_head(attrs, mix_T))[..., : _chunk_len(ragged)],
        _padded_total(ragged, total_TB),
    )
    before = widen(state.index_select(0, src_S))
    y, after = _scan(q, k, chunks, before)
    first_dst_S = dst_slots(dst_SR)[:, 0]
    state[first_dst_S] = after.to(state.dtype)
    y_T = _packed(ragged, y).flatten(1)
    return (y_T.to(DTYPES[attrs["dtype"]]),)


def _padded_total(ragged: Ragged, total_TB: Tensor) -> Tensor:
    """G in chunks: after a sequence's end it keeps its last value, as padding decays nothing."""
    total = _in_chunks(ragged, total_TB)
    if ragged.is_even:
        return total
    valid_S1L = ragged.valid_SL.unsqueeze(1)
    valid_S1Nc = valid_S1L.unflatten(2, (-1, _chunk_len(ragged)))
    masked = total.masked_fill(~valid_S1Nc, float("inf"))
    held = masked.cummin(-1).values
    return held.masked_fill(held.isinf(), 0.0)  # chunks that lie after the end


def dst_slots(dst_state_slots: Tensor) -> Tensor:
    """The state slots to write, [S, R or more]; a plan that does not speculate has one each."""
    return dst_state_slots.view(dst_state_slots.shape[0], -1)
