"""advance

advance: the inputs of the next decode step, in place; padding (src_state_slots = 0) stays
Source: inputs of the next step, so that no host has to write them

Grid: one program for all sequences: it is a few numbers each.
PAGE tokens a page, PAGES entries of a sequence's page table, BLOCK sequences at most (a power of
two); `s` counts sequences.
"""

import triton
import triton.language as tl


@triton.jit
def advance(
    next_tokens,  # input, i32 [num_seqs]
    page_table,  # input, i32 [num_seqs, 80]
    token_ids,  # state, i32 [num_tokens]
    positions,  # state, i32 [num_tokens]
    slot_mapping,  # state, i32 [num_tokens]
    context_lens,  # state, i32 [num_seqs]
    src_state_slots,  # state, i32 [num_seqs]
    dst_state_slots,  # state, i32 [num_seqs]
    rng_offset,  # state, i64 [num_seqs]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK: tl.constexpr = 8
    PAGE: tl.constexpr = 16
    PAGES: tl.constexpr = 80

    s = tl.arange(0, BLOCK)
    ok = s < num_seqs
    src = tl.load(src_state_slots + s, mask=ok, other=0)
    ok &= src > 0  # slot 0 is padding
    dst_ptr = dst_state_slots + s
    # All loads come before all stores: a load would wait for an earlier store.
    dst = tl.load(dst_ptr, mask=ok, other=0)
    token = tl.load(next_tokens + s, mask=ok, other=0)
    length = tl.load(context_lens + s, mask=ok, other=0) + 1
    drawn = tl.load(rng_offset + s, mask=ok, other=0) + 1
    position = tl.load(positions + s, mask=ok, other=0) + 1
    page = tl.load(
        page_table + s * PAGES + tl.minimum(position // PAGE, PAGES - 1), mask=ok, other=0
    )
    tl.store(src_state_slots + s, dst, mask=ok)
    tl.store(token_ids + s, token, mask=ok)
    tl.store(context_lens + s, length, mask=ok)
    tl.store(rng_offset + s, drawn, mask=ok)
    tl.store(positions + s, position, mask=ok)
    tl.store(slot_mapping + s, page * PAGE + position % PAGE, mask=ok)
