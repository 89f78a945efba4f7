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
    """Advance by one token: it is the next input, and the state slot that was written is read next.

    The slot that was read is the next to write. Padding (state slot 0) stays as it is.
    """
    live_S = src_state_slots_S > 0
    token_ids_S.copy_(next_tokens_S.where(live_S, token_ids_S))
    for number_S in (positions_S, context_lens_S, rng_offset_S):
        number_S += live_S
    page_size = attrs["page_size"]
    column_S = (positions_S // page_size).clamp(max=page_table_SP.shape[1] - 1)
    page_S = page_table_SP.gather(1, column_S.long()[:, None])[:, 0]
    slot_S = page_S * page_size + positions_S % page_size
    slot_mapping_S.copy_(slot_S.where(live_S, slot_mapping_S))
    first_S = dst_state_slots_S
    if dst_state_slots_S.dim() > 1:
        first_S = dst_state_slots_S[:, 0]
    read_S = src_state_slots_S.clone()
    written_S = first_S.clone()
    src_state_slots_S.copy_(written_S.where(live_S, read_S))
    first_S.copy_(read_S.where(live_S, written_S))
    return ()
