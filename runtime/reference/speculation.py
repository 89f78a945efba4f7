"""Draft, verify and accept: what the decode step of a plan that speculates does besides running the model.

A step has R = depth + 1 queries of each sequence: query 0 is its last token, queries 1 to depth are
drafts. The target samples s_i after each query i, with the random number of that token, as if it
came alone. A draft is an argmax, so it proposes one token with certainty; for such a proposal x rejection
sampling (arXiv:2211.17192) accepts x with probability p(x) and else draws from p without x. To draw
s_i from p and accept where s_i = x is the same thing: so speculation changes neither the
distribution nor, for the same seed, a single token.

Shapes: T queries in all, S sequences, R queries of a sequence (`query_len`), D = R - 1 drafts, N stop
ids, H hidden, V vocabulary, P pages of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenspeed_plan.runtime.reference.sampling import uniform

Attrs = Mapping[str, Any]


def shift_tokens(
    attrs: Attrs,
    token_ids_T: Tensor,
    following_S: Tensor,
    next_tokens_S: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor]:
    """The token after each one; after a sequence's last one what the host knows to follow, else what was sampled."""
    shifted_T = torch.cat((token_ids_T[1:], token_ids_T[:1]))
    shifted_T[cu_seqlens[1:].long() - 1] = following_S.where(following_S >= 0, next_tokens_S)
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

    A sequence goes no further than a token that ends it, nor than it has memory for: its state is
    then where it ends. `counts` adds up how many sequences reached each query; padding does not
    count. `forced` is zero, unless a benchmark simulates acceptance: see the operator's entry in
    `plans/ops.py`.
    """
    query_len = attrs["query_len"]
    num_drafts = query_len - 1
    sampled_SR = next_tokens_T.view(-1, query_len)
    drafts_SD = token_ids_T.view(-1, query_len)[:, 1:]
    same_SD = sampled_SR[:, :-1] == drafts_SD

    number_D = torch.arange(num_drafts, device=rng_offset_S.device)
    chance_SD = uniform(seed_S[:, None], rng_offset_S[:, None] + number_D)
    forced_D = forced[:num_drafts]
    same_SD = torch.where(forced_D != 0, chance_SD < forced_D, same_SD)

    stops_SR = (sampled_SR[:, :, None] == stop_ids_SN[:, None]).any(-1)
    right_SD = same_SD & ~stops_SR[:, :-1]
    before_S = context_S - query_len
    room_S = max_lens_S - before_S - 1
    num_right_S = right_SD.int().cumprod(1).sum(1)
    accepted_S = num_right_S.minimum(room_S).clamp(min=0).int()

    number_R = torch.arange(query_len, device=sampled_SR.device)
    reached_SR = number_R[None] <= accepted_S[:, None]
    live_S = src_state_slots_S > 0
    counts[:query_len] += (reached_SR & live_S[:, None]).sum(0)
    last_S = sampled_SR.gather(1, accepted_S[:, None].long())[:, 0]
    return accepted_S, before_S + accepted_S + 1, last_S


def select_row(attrs: Attrs, x_TH: Tensor, accepted_S: Tensor) -> tuple[Tensor]:
    """The last accepted query of each sequence."""
    first_S = torch.arange(len(accepted_S), device=x_TH.device) * attrs["query_len"]
    return (x_TH.index_select(0, first_S + accepted_S),)


def draft(attrs: Attrs, logits_SV: Tensor, earlier: Tensor) -> tuple[Tensor]:
    """The most likely token, after the tokens before it."""
    best_S = logits_SV.argmax(-1).int()
    return (torch.cat((earlier.view(len(best_S), -1), best_S[:, None]), 1),)


def draft_place(
    attrs: Attrs, lens_S: Tensor, page_table_SP: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Position, slot and context of the query that comes `step` after a sequence's last one."""
    positions_S = lens_S + (attrs["step"] - 1)
    slots_SR = _slots(attrs["page_size"], positions_S[:, None], page_table_SP)
    return positions_S, slots_SR[:, 0], positions_S + 1


def _slots(page_size: int, positions_SR: Tensor, page_table_SP: Tensor) -> Tensor:
    """Columns beyond a sequence's pages name the page of padding, so that a query too far harms nobody."""
    column_SR = (positions_SR // page_size).clamp(max=page_table_SP.shape[1] - 1)
    page_SR = page_table_SP.gather(1, column_SR.long())
    return (page_SR * page_size + positions_SR % page_size).int()


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
    """The last token sampled and the drafts after it are the next queries.

    The state slot of the last accepted query is read next, and the one that was read is written in
    its place; no state is copied. Padding (state slot 0) stays as it is.
    """
    query_len = attrs["query_len"]
    live_S = src_state_slots_S > 0
    live_S1 = live_S[:, None]
    step_S = (accepted_S + 1) * live_S
    token_ids_SR = token_ids_T.view(-1, query_len)
    token_ids_SR.copy_(drafts_SR.where(live_S1, token_ids_SR))
    positions_T += step_S.repeat_interleave(query_len)
    slots_SR = _slots(attrs["page_size"], positions_T.view(-1, query_len), page_table_SP)
    slot_mapping_SR = slot_mapping_T.view(-1, query_len)
    slot_mapping_SR.copy_(slots_SR.where(live_S1, slot_mapping_SR))
    for number_S in (context_lens_S, rng_offset_S):
        number_S += step_S
    _exchange_state_slots(accepted_S, live_S, src_state_slots_S, dst_state_slots_SR)
    return ()


def _exchange_state_slots(
    accepted_S: Tensor, live_S: Tensor, src_state_slots_S: Tensor, dst_state_slots_SR: Tensor
) -> None:
    dst_state_slots_SR = dst_state_slots_SR.view(len(accepted_S), -1)
    column_S1 = accepted_S[:, None].long()
    if dst_state_slots_SR.shape[1] == 1:  # the plan recomputes the state: one slot for all queries
        column_S1 = torch.zeros_like(column_S1)
    read_S = src_state_slots_S.clone()
    written_S = dst_state_slots_SR.gather(1, column_S1)[:, 0]
    src_state_slots_S.copy_(written_S.where(live_S, read_S))
    dst_state_slots_SR.scatter_(1, column_S1, read_S.where(live_S, written_S)[:, None])
