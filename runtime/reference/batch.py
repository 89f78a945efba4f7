"""The inputs of the next decode step, made from those of this one. Shapes: S sequences, P pages of a sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    """One token further: it is the next input, and the row that was written is read. Rows of padding (0) stay."""
    live = src_state_slots_S > 0
    token_ids_S.copy_(next_tokens_S.where(live, token_ids_S))
    for count in (positions_S, context_lens_S, rng_offset_S):
        count += live
    page_size = attrs["page_size"]
    column = (positions_S // page_size).clamp(max=page_table_SP.shape[1] - 1).long()
    slot = page_table_SP.gather(1, column[:, None])[:, 0] * page_size + positions_S % page_size
    slot_mapping_S.copy_(slot.where(live, slot_mapping_S))
    first_S = dst_state_slots_S if dst_state_slots_S.dim() == 1 else dst_state_slots_S[:, 0]
    read, write = src_state_slots_S.clone(), first_S.clone()
    src_state_slots_S.copy_(write.where(live, read))
    first_S.copy_(read.where(live, write))
    return ()
