"""Draft, verify and accept: what a decode step with speculation does besides running the model.

A step has R = depth + 1 queries of each sequence: query 0 is its last token, queries 1 to depth are
drafts. The target samples s_i after each query i, with the random number of that token, as if it
came alone. A draft is an argmax, so it proposes one token with certainty. For such a proposal x,
rejection sampling (arXiv:2211.17192) accepts x with probability p(x) and otherwise samples from p
without x. To sample s_i from p and to accept where s_i = x is the same thing. So speculation
changes neither the distribution nor, for the same seed, a single token.

Shapes: T queries in all, S sequences, R queries of a sequence (`query_len`), D = R - 1 drafts, N
stop ids, H hidden, V vocabulary, P pages of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenspeed_plan.runtime.reference.sampling import uniform
from tokenspeed_plan.runtime.reference.step_inputs import cache_slots

Attrs = Mapping[str, Any]


def shift_tokens(
    attrs: Attrs,
    token_ids_T: Tensor,
    following_S: Tensor,
    next_tokens_S: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor]:
    """The token that follows each token of a prefill step: the inputs of a draft model.

    After a sequence's last token it is `following`, where the host knows it (>= 0), else the token
    that was sampled.
    """
    shifted_T = token_ids_T.roll(-1)
    is_known_S = following_S >= 0
    end_S = cu_seqlens[1:].long()
    shifted_T[end_S - 1] = following_S.where(is_known_S, next_tokens_S)
    return (shifted_T,)


def accept(
    attrs: Attrs,
    token_ids_T: Tensor,
    next_tokens_T: Tensor,
    context_S: Tensor,
    src_state_slots_S: Tensor,
    max_lens_S: Tensor,
    stop_ids_SN: Tensor,
    seed_S: Tensor,
    rng_offset_S: Tensor,
    forced: Tensor,
    counts: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """How many drafts are accepted, the length of the state after them, and the last token sampled.

    No draft is accepted after a token that ends the sequence, or beyond `max_lens`, the tokens that
    it has memory for. `counts` adds up how many sequences reached each query, without padding.
    `forced` is zero, unless a benchmark simulates acceptance: see the operator in `plans/ops`.
    """
    query_len = attrs["query_len"]
    sampled_SR = next_tokens_T.view(-1, query_len)
    drafts_SD = token_ids_T.view(-1, query_len)[:, 1:]
    is_same_SD = sampled_SR[:, :-1] == drafts_SD
    is_same_SD = _forced_acceptance(forced, seed_S, rng_offset_S, is_same_SD)

    sampled_SR1 = sampled_SR.unsqueeze(2)
    stop_ids_S1N = stop_ids_SN.unsqueeze(1)
    is_stop_SRN = sampled_SR1 == stop_ids_S1N
    is_stop_SR = is_stop_SRN.any(-1)
    is_right_SD = is_same_SD & ~is_stop_SR[:, :-1]
    is_in_prefix_SD = is_right_SD.int().cumprod(1)
    num_right_S = is_in_prefix_SD.sum(1)
    before_S = context_S - query_len
    room_S = max_lens_S - before_S - 1
    accepted_S = num_right_S.minimum(room_S)
    accepted_S = accepted_S.clamp(min=0).int()

    _count_reached(counts[:query_len], accepted_S, src_state_slots_S)
    last_column_S1 = accepted_S.unsqueeze(1).long()
    last_S1 = sampled_SR.gather(1, last_column_S1)
    state_len_S = before_S + accepted_S + 1
    return accepted_S, state_len_S, last_S1.squeeze(1)


def _forced_acceptance(
    forced: Tensor, seed_S: Tensor, rng_offset_S: Tensor, is_same_SD: Tensor
) -> Tensor:
    """Where `forced` is a probability, drafts are accepted by chance, whatever was sampled."""
    num_drafts = is_same_SD.shape[1]
    number_D = torch.arange(num_drafts, device=rng_offset_S.device)
    rng_offset_SD = rng_offset_S.unsqueeze(1) + number_D
    chance_SD = uniform(seed_S.unsqueeze(1), rng_offset_SD)
    forced_D = forced[:num_drafts]
    is_lucky_SD = chance_SD < forced_D
    return is_lucky_SD.where(forced_D != 0, is_same_SD)


def _count_reached(counts_R: Tensor, accepted_S: Tensor, src_state_slots_S: Tensor) -> None:
    """Add to each query the number of sequences that reached it; padding has state slot 0."""
    query_len = len(counts_R)
    number_R = torch.arange(query_len, device=accepted_S.device)
    reached_SR = number_R <= accepted_S.unsqueeze(1)
    is_live_S1 = src_state_slots_S.unsqueeze(1) > 0
    counted_SR = reached_SR & is_live_S1
    counts_R += counted_SR.sum(0)


def select_row(attrs: Attrs, x_TH: Tensor, accepted_S: Tensor) -> tuple[Tensor]:
    """The last accepted query of each sequence, [S, H]."""
    num_seqs = len(accepted_S)
    number_S = torch.arange(num_seqs, device=x_TH.device)
    first_S = number_S * attrs["query_len"]
    last_S = first_S + accepted_S
    return (x_TH.index_select(0, last_S),)


def draft(attrs: Attrs, logits_SV: Tensor, earlier: Tensor) -> tuple[Tensor]:
    """The most likely token, appended to the tokens before it: [S, drafts + 1]."""
    best_S1 = logits_SV.argmax(-1, keepdim=True).int()
    num_seqs = len(best_S1)
    earlier_SR = earlier.view(num_seqs, -1)
    drafts_SR = torch.cat((earlier_SR, best_S1), 1)
    return (drafts_SR,)


def draft_place(
    attrs: Attrs, lens_S: Tensor, page_table_SP: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Position, slot and context of the query that comes `step` after a sequence's last one."""
    steps_after = attrs["step"] - 1
    positions_S = lens_S + steps_after
    positions_S1 = positions_S.unsqueeze(1)
    slots_S1 = cache_slots(attrs["page_size"], positions_S1, page_table_SP)
    return positions_S, slots_S1.squeeze(1), positions_S + 1


def advance_rows(
    attrs: Attrs,
    accepted_S: Tensor,
    drafts_SR: Tensor,
    page_table_SP: Tensor,
    token_ids_T: Tensor,
    positions_T: Tensor,
    slot_mapping_T: Tensor,
    context_lens_S: Tensor,
    src_state_slots_S: Tensor,
    dst_state_slots_SR: Tensor,
    rng_offset_S: Tensor,
) -> tuple[()]:
    """Advance each sequence: the last token sampled and the drafts after it are the next queries.

    The next step reads the state slot of the last accepted query, and may write the slot that this
    step read; no state is copied. Padding (state slot 0) stays as it is.
    """
    query_len = attrs["query_len"]
    is_live_S = src_state_slots_S > 0
    is_live_S1 = is_live_S[:, None]
    step_S = (accepted_S + 1) * is_live_S

    token_ids_SR = token_ids_T.view(-1, query_len)
    token_ids_SR.copy_(drafts_SR.where(is_live_S1, token_ids_SR))
    positions_T += step_S.repeat_interleave(query_len)
    positions_SR = positions_T.view(-1, query_len)
    slots_SR = cache_slots(attrs["page_size"], positions_SR, page_table_SP)
    slot_mapping_SR = slot_mapping_T.view(-1, query_len)
    slot_mapping_SR.copy_(slots_SR.where(is_live_S1, slot_mapping_SR))
    context_lens_S += step_S
    rng_offset_S += step_S
    _exchange_state_slots(accepted_S, is_live_S, src_state_slots_S, dst_state_slots_SR)
    return ()


def _exchange_state_slots(
    accepted_S: Tensor, is_live_S: Tensor, src_state_slots_S: Tensor, dst_state_slots: Tensor
) -> None:
    """Swap the slot that was read with the one of the last accepted query."""
    dst_state_slots_SR = dst_state_slots.view(len(accepted_S), -1)
    column_S1 = accepted_S.unsqueeze(1).long()
    if dst_state_slots_SR.shape[1] == 1:  # the plan recomputes the state: one slot for all queries
        column_S1 = torch.zeros_like(column_S1)
    src_S = src_state_slots_S.clone()
    dst_S1 = dst_state_slots_SR.gather(1, column_S1)
    dst_S = dst_S1.squeeze(1)
    new_src_S = dst_S.where(is_live_S, src_S)
    new_dst_S = src_S.where(is_live_S, dst_S)
    src_state_slots_S.copy_(new_src_S)
    dst_state_slots_SR.scatter_(1, column_S1, new_dst_S.unsqueeze(1))
