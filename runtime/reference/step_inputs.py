"""The inputs of the next decode step, made from those of this one.

Shapes: S sequences, R queries of a sequence, P pages of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Attrs = Mapping[str, Any]


def advance(
    attrs: Attrs,
    next_tokens_S: Tensor,
    page_table_SP: Tensor,
    token_ids_S: Tensor,
    positions_S: Tensor,
    slot_mapping_S: Tensor,
    context_lens_S: Tensor,
    src_state_slots_S: Tensor,
    dst_state_slots_S: Tensor,
    rng_offset_S: Tensor,
) -> tuple[()]:
    """Advance each sequence by the token that was sampled.

    The next step reads the state slot that this one wrote, and writes the one that it read, or with
    `in_place` the same one. Padding (state slot 0) stays as it is.
    """
    is_live_S = src_state_slots_S > 0
    torch.where(is_live_S, next_tokens_S, token_ids_S, out=token_ids_S)
    for number_S in (positions_S, context_lens_S, rng_offset_S):
        number_S += is_live_S
    slots_S1 = cache_slots(attrs["page_size"], positions_S.unsqueeze(1), page_table_SP)
    slots_S = slots_S1.squeeze(1)
    torch.where(is_live_S, slots_S, slot_mapping_S, out=slot_mapping_S)
    if attrs.get("in_place"):
        torch.where(is_live_S, dst_state_slots_S, src_state_slots_S, out=src_state_slots_S)
    else:
        _swap_state_slots(is_live_S, src_state_slots_S, dst_state_slots_S)
    return ()


def cache_slots(page_size: int, positions_SR: Tensor, page_table_SP: Tensor) -> Tensor:
    """The cache slot of each position, i32 [S, R].

    The last column of a table is the padding page: positions beyond a sequence's pages go there.
    """
    last_column = page_table_SP.shape[1] - 1
    index_SR = positions_SR // page_size
    column_SR = index_SR.clamp(max=last_column)
    page_SR = page_table_SP.gather(1, column_SR.long())
    offset_SR = positions_SR % page_size
    slot_SR = page_SR * page_size + offset_SR
    return slot_SR.int()


def _swap_state_slots(
    is_live_S: Tensor, src_state_slots_S: Tensor, dst_state_slots: Tensor
) -> None:
    """Swap the slot that was read with the first of those that may be written."""
    first_dst_S = dst_state_slots
    if dst_state_slots.dim() > 1:
        first_dst_S = dst_state_slots[:, 0]
    src_S = src_state_slots_S.clone()
    dst_S = first_dst_S.clone()
    src_state_slots_S.copy_(dst_S.where(is_live_S, src_S))
    first_dst_S.copy_(src_S.where(is_live_S, dst_S))
