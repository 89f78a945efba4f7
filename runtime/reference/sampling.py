"""The next token of each sequence.

Shapes: S sequences (or queries, where a sequence has several), V rows of the embedding table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Attrs = Mapping[str, Any]


def _signed(value: int) -> int:
    """64 bits as a signed number."""
    if value >= 1 << 63:
        value -= 1 << 64
    return value


# The constants of SplitMix64.
_GOLDEN_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST_FACTOR = _signed(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = _signed(0x94D049BB133111EB)


def adjust(
    attrs: Attrs,
    logits_RV: Tensor,
    token_ids_T: Tensor,
    is_adjusted_S: Tensor,
    presence_S: Tensor,
    frequency_S: Tensor,
    repetition_S: Tensor,
    adjustments_SW: Tensor,
) -> tuple[Tensor]:
    """Biases, then penalties of tokens that were there before, in the order of vLLM.

    A sequence has a number of entries, and of each a token, twice its count in the answer plus one
    if the prompt has it, and a bias. Before query i the answer also has the drafts 1 to i.

        l = l + bias
        l = l / repetition if l > 0, else l * repetition      where prompt or answer has the token
        l = l - frequency * count - presence * [count > 0]    (OpenAI's definition)
    """
    query_len = attrs.get("query_len", 1)
    y_RV = logits_RV.clone()
    for s in is_adjusted_S.nonzero().flatten().tolist():
        number = int(adjustments_SW[s, 0])
        ids_E, seen_E, bits_E = adjustments_SW[s, 1 : 1 + 3 * number].view(-1, 3).unbind(1)
        ids_E, bias_E = ids_E.long(), bits_E.contiguous().view(torch.float32)
        count_E = seen_E // 2
        for query in range(query_len):
            row = s * query_len + query
            if query:
                count_E = count_E + (ids_E == token_ids_T[row])
            x_E = logits_RV[row, ids_E].float() + bias_E
            is_seen_E = (seen_E % 2 > 0) | (count_E > 0)
            repeated_E = torch.where(x_E > 0, x_E / repetition_S[s], x_E * repetition_S[s])
            x_E = repeated_E.where(is_seen_E, x_E)
            x_E = x_E - frequency_S[s] * count_E - presence_S[s] * (count_E > 0)
            y_RV[row, ids_E] = x_E.to(y_RV.dtype)
    return (y_RV,)


def mask(
    attrs: Attrs, logits_RV: Tensor, is_masked_S: Tensor, token_mask_SW: Tensor
) -> tuple[Tensor]:
    """-inf for each token whose bit is 0, in the rows of sequences with a grammar.

    A row of `token_mask` has V / 32 words, rounded up, for each query of its sequence, and may have
    more. Bit v % 32 of word v // 32 stands for token v. What is no number stays so: where all
    logits are none, the first token is sampled, as without a grammar, and tells.
    """
    query_len = attrs.get("query_len", 1)
    num_rows, vocabulary = logits_RV.shape
    words = -(-vocabulary // 32)
    mask_RW = token_mask_SW[:, : query_len * words].reshape(num_rows, words)
    shift = torch.arange(32, dtype=torch.int32, device=mask_RW.device)
    bits_RV = ((mask_RW.unsqueeze(2) >> shift) & 1).reshape(num_rows, -1)[:, :vocabulary]
    is_masked_R1 = (is_masked_S != 0).repeat_interleave(query_len).unsqueeze(1)
    is_dropped_RV = (bits_RV == 0) & is_masked_R1 & ~logits_RV.isnan()
    return (logits_RV.masked_fill(is_dropped_RV, float("-inf")),)


def sample(
    attrs: Attrs,
    logits_SV: Tensor,
    temperature_S: Tensor,
    top_p_S: Tensor,
    top_k_S: Tensor,
    seed_S: Tensor,
    rng_offset_S: Tensor,
    min_p_S: Tensor | None = None,
) -> tuple[Tensor]:
    """Argmax where the temperature is 0, else a sample of softmax(logits / temperature).

    Samples are taken after min-p, top-k and top-p. A token depends on the seed of its sequence and
    on its number, `rng_offset`, and on nothing else in the batch. Where a sequence has several
    queries, query i is token `rng_offset + i`. Rows of the table that are no token are never
    sampled. Where the logits give no distribution (their sum is not finite), the token is the
    argmax.
    """
    tokens_S = logits_SV.argmax(-1).int()
    if not temperature_S.any():
        return (tokens_S,)
    if min_p_S is None:
        min_p_S = torch.zeros_like(top_p_S)
    params: tuple[Tensor, ...]
    params = (temperature_S, top_p_S, top_k_S, min_p_S, seed_S, rng_offset_S)
    query_len = attrs.get("query_len", 1)
    if query_len > 1:
        params = _for_each_query(query_len, *params)
    is_sampled_S = params[0] > 0
    sampled = is_sampled_S.nonzero().flatten()
    if sampled.numel():
        num_valid = attrs["num_valid_tokens"]
        operands = [x[sampled] for x in (tokens_S, logits_SV, *params)]
        tokens_S[sampled] = _draw(num_valid, *operands)
    return (tokens_S,)


def _for_each_query(query_len: int, *params_S: Tensor) -> tuple[Tensor, ...]:
    """The parameters of each query; the last, `rng_offset`, counts on from the sequence's own."""
    *others, rng_offset = (param.repeat_interleave(query_len) for param in params_S)
    index = torch.arange(len(rng_offset), device=rng_offset.device)
    return (*others, rng_offset + index % query_len)


def _draw(
    num_valid: int,
    greedy: Tensor,
    logits: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    min_p: Tensor,
    seed: Tensor,
    rng_offset: Tensor,
) -> Tensor:
    """The first token at which the cumulated probability exceeds a uniform share of the total."""
    probs, ids = filtered(logits[:, :num_valid], temperature, top_p, top_k, min_p)
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1]
    target = uniform(seed, rng_offset) * total
    is_before = cumulative <= target.unsqueeze(1)
    place = is_before.sum(-1, keepdim=True)
    is_kept = probs > 0
    num_kept = is_kept.sum(-1, keepdim=True)
    last = (num_kept - 1).clamp(min=0)
    column = torch.minimum(place, last)
    drawn = ids.gather(1, column).squeeze(1).int()
    has_distribution = total > 0  # false where the total is NaN
    return drawn.where(has_distribution, greedy)


def filtered(
    logits: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    min_p: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Probabilities [S, V] in fp64, the largest first, zero where cut off, and their token ids.

    Min-p keeps those that are at least p times as likely as the most likely one
    (arXiv:2407.01082). Top-k keeps the k most likely tokens (0: all); top-p keeps the smallest set
    of them whose probabilities add up to p (arXiv:1904.09751). The most likely token is always
    kept.
    """
    temperature = temperature.double().unsqueeze(1)
    top_p = top_p.double().unsqueeze(1)
    top_k = top_k.unsqueeze(1)
    scaled = logits.double() / temperature
    scaled, ids = scaled.sort(dim=-1, descending=True, stable=True)
    num_tokens = scaled.shape[1]
    rank = torch.arange(num_tokens, device=scaled.device)
    in_top_k = (top_k <= 0) | (rank < top_k)
    if min_p is not None:
        in_top_k &= scaled >= scaled[:, :1] + min_p.double().log().unsqueeze(1)
    masked = scaled.masked_fill(~in_top_k, float("-inf"))
    probs = masked.softmax(-1)
    before = probs.cumsum(-1) - probs
    in_top_p = before < top_p
    is_kept = in_top_p | (rank == 0)
    return probs * is_kept, ids


def uniform(seed: Tensor, rng_offset: Tensor) -> Tensor:
    """A number in [0, 1) for each (seed, rng_offset), in fp64.

    It is the output function of SplitMix64 (Steele et al., OOPSLA 2014).
    """
    number = rng_offset + 1
    x = seed + number * _GOLDEN_GAMMA
    x = x ^ _shift(x, 30)
    x = x * _FIRST_FACTOR
    x = x ^ _shift(x, 27)
    x = x * _SECOND_FACTOR
    x = x ^ _shift(x, 31)
    mantissa = _shift(x, 11)
    return mantissa.double() * 2.0**-53


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right."""
    mask = (1 << (64 - bits)) - 1
    return (x >> bits) & mask
