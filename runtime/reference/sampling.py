"""The next token of each sequence. Shapes: S sequences, V vocabulary rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Attrs = Mapping[str, Any]


def sample(
    attrs: Attrs,
    logits_SV: Tensor,
    temperature_S: Tensor,
    top_p_S: Tensor,
    top_k_S: Tensor,
    seed_S: Tensor,
    rng_offset_S: Tensor,
) -> tuple[Tensor]:
    """Argmax where the temperature is 0, else one draw from softmax(logits / temperature) after top-k and top-p.

    The draw is a function of a sequence's seed and of `rng_offset`, its token's number, so that
    neither batch nor order matter. Where sequences have several queries, query i is token
    `rng_offset + i`, drawn as it would be alone. Rows of the table that stand for no token are
    never drawn. Logits without a finite sum give no distribution: argmax.
    """
    tokens_S = logits_SV.argmax(-1).int()
    params = (temperature_S, top_p_S, top_k_S, seed_S, rng_offset_S)
    query_len = attrs.get("query_len", 1)
    if query_len > 1:
        params = _for_each_query(query_len, *params)
    hot = (params[0] > 0).nonzero().flatten()
    if hot.numel():
        of_hot = [x[hot] for x in (tokens_S, logits_SV, *params)]
        tokens_S[hot] = _draw(attrs["num_valid_tokens"], *of_hot)
    return (tokens_S,)


def _for_each_query(
    query_len: int,
    temperature_S: Tensor,
    top_p_S: Tensor,
    top_k_S: Tensor,
    seed_S: Tensor,
    rng_offset_S: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The parameters of each query, whose `rng_offset` counts on from its sequence's."""
    temperature, top_p, top_k, seed, rng_offset = (
        x.repeat_interleave(query_len)
        for x in (temperature_S, top_p_S, top_k_S, seed_S, rng_offset_S)
    )
    query = torch.arange(len(rng_offset), device=rng_offset.device) % query_len
    return temperature, top_p, top_k, seed, rng_offset + query


def _draw(
    valid: int,
    greedy: Tensor,
    logits: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    seed: Tensor,
    rng_offset: Tensor,
) -> Tensor:
    probs, ids = filtered(logits[:, :valid], temperature, top_p, top_k)
    cumulative = probs.cumsum(-1)
    target = uniform(seed, rng_offset)[:, None] * cumulative[:, -1:]
    place = (cumulative <= target).sum(-1, keepdim=True)
    last = ((probs > 0).sum(-1, keepdim=True) - 1).clamp(min=0)
    drawn = ids.gather(1, torch.minimum(place, last))[:, 0].int()
    return torch.where(cumulative[:, -1] > 0, drawn, greedy)  # NaN is not


def filtered(
    logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor
) -> tuple[Tensor, Tensor]:
    """Probabilities [S, V] in fp64, best first, zero where cut off, and their token ids.

    Top-k keeps the k best (0: all), top-p the smallest set of the best that holds at least p of
    what is left (arXiv:1904.09751); the best token always stays.
    """
    scaled = logits.double() / temperature.double()[:, None]
    scaled, ids = torch.sort(scaled, dim=-1, descending=True, stable=True)
    rank = torch.arange(scaled.shape[1], device=scaled.device)[None]
    kept = (top_k[:, None] <= 0) | (rank < top_k[:, None])
    probs = scaled.masked_fill(~kept, float("-inf")).softmax(-1)
    before = probs.cumsum(-1) - probs
    return probs * ((before < top_p.double()[:, None]) | (rank == 0)), ids


def uniform(seed: Tensor, rng_offset: Tensor) -> Tensor:
    """A number in [0, 1) for each (seed, rng_offset): the output function of SplitMix64 (Steele et al., OOPSLA 2014)."""
    x = seed + (rng_offset + 1) * _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return _shift(x ^ _shift(x, 31), 11).double() * 2.0**-53


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
