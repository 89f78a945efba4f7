"""Draft, verify and accept: what the decode step of a plan that speculates does besides running the model.

A step has R = depth + 1 rows of each sequence: row 0 is its last token, rows 1 to depth are drafts.
The target samples s_i after each row i, with the random number of that token, as if it came alone.
A draft is an argmax, so it proposes one token with certainty; for such a proposal x rejection
sampling (arXiv:2211.17192) accepts x with probability p(x) and else draws from p without x. To draw
s_i from p and accept where s_i = x is the same thing: so speculation changes neither the
distribution nor, for the same seed, a single token.

Shapes: T rows, S sequences, R rows of a sequence, H hidden, V vocabulary, P pages of a sequence.
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
    """How many drafts were right, the tokens computed with them, and the last token said; padding counts nothing.

    A sequence goes no further than a token that ends it, nor than it has memory for: its state is
    then where it ends. `forced` is zero, unless a benchmark simulates acceptance: see the
    operator's row in `plans/ops.py`.
    """
    count = attrs["query_len"]
    said_SR, rows_SR = next_tokens_T.view(-1, count), token_ids_T.view(-1, count)
    stops_SR = (said_SR[:, :, None] == stop_ids_SN[:, None]).any(-1)
    same_SR = said_SR[:, :-1] == rows_SR[:, 1:]
    chance_SR = uniform(
        seed_S[:, None], rng_offset_S[:, None] + torch.arange(count - 1, device=rng_offset_S.device)
    )
    same_SR = torch.where(forced[: count - 1] != 0, chance_SR < forced[: count - 1], same_SR)
    right_SR = same_SR & ~stops_SR[:, :-1]
    before_S = context_S - count
    accepted_S = (
        right_SR.int().cumprod(1).sum(1).minimum(max_lens_S - before_S - 1).clamp(min=0).int()
    )
    reached_SR = torch.arange(count, device=said_SR.device)[None] <= accepted_S[:, None]
    counts[:count] += (reached_SR & (src_state_slots_S > 0)[:, None]).sum(0)
    last_S = said_SR.gather(1, accepted_S[:, None].long())[:, 0]
    return accepted_S, before_S + accepted_S + 1, last_S


def select_row(attrs: Attrs, x_TH: Tensor, accepted_S: Tensor) -> tuple[Tensor]:
    """The row of each sequence up to which its drafts were right."""
    first_S = torch.arange(len(accepted_S), device=x_TH.device) * attrs["query_len"]
    return (x_TH.index_select(0, first_S + accepted_S),)


def draft(attrs: Attrs, logits_SV: Tensor, earlier: Tensor) -> tuple[Tensor]:
    """The most likely token, after the tokens before it."""
    best_S = logits_SV.argmax(-1).int()
    return (torch.cat((earlier.view(len(best_S), -1), best_S[:, None]), 1),)


def draft_place(
    attrs: Attrs, lens_S: Tensor, page_table_SP: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Position, slot and context of the row that comes `step` after a sequence's last one."""
    positions_S = lens_S + (attrs["step"] - 1)
    return (
        positions_S,
        _slots(attrs["page_size"], positions_S[:, None], page_table_SP)[:, 0],
        positions_S + 1,
    )


def _slots(page_size: int, positions_SR: Tensor, page_table_SP: Tensor) -> Tensor:
    """Table columns that are no page of the sequence name the spare page, so a row too far harms nobody."""
    column_SR = (positions_SR // page_size).clamp(max=page_table_SP.shape[1] - 1).long()
    return (page_table_SP.gather(1, column_SR) * page_size + positions_SR % page_size).int()


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
    write_rows_SR: Tensor,
    rng_offset_S: Tensor,
) -> tuple[()]:
    """The last token said and the drafts after it are the next rows. Rows of state change places, none is copied."""
    count = attrs["query_len"]
    live_S = src_state_slots_S > 0
    step_S = (accepted_S + 1) * live_S
    token_ids_T.copy_(drafts_SR.where(live_S[:, None], token_ids_T.view(-1, count)).flatten())
    positions_T += step_S.repeat_interleave(count)
    slots_SR = _slots(attrs["page_size"], positions_T.view(-1, count), page_table_SP)
    slot_mapping_T.copy_(slots_SR.where(live_S[:, None], slot_mapping_T.view(-1, count)).flatten())
    for number_S in (context_lens_S, rng_offset_S):
        number_S += step_S
    write_rows_SR = write_rows_SR.view(len(accepted_S), -1)
    place_S1, before_S = accepted_S[:, None].long(), src_state_slots_S.clone()
    if write_rows_SR.shape[1] == 1:  # the one that `replay` wrote
        place_S1 = torch.zeros_like(place_S1)
    written_S = write_rows_SR.gather(1, place_S1)[:, 0]
    src_state_slots_S.copy_(written_S.where(live_S, before_S))
    write_rows_SR.scatter_(1, place_S1, before_S.where(live_S, written_S)[:, None])
    return ()
