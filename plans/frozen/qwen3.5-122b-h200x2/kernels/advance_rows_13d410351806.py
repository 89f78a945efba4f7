"""advance_rows

advance_rows: advance by accepted + 1 tokens: token_ids = drafts; src_state_slots =
dst_state_slots[accepted], or the only one
Source: inputs of the next step, advanced by the accepted drafts;
state slots are exchanged, no state is copied

Grid: one program for all sequences: it is a few numbers each.
QUERY_LEN tokens a sequence, PAGE tokens a page, PAGES entries of a sequence's page table, BLOCK
sequences at most (a power of two); `s` counts sequences.
"""

import triton
import triton.language as tl


@triton.jit
def advance_rows(
    accepted,  # input, i32 [num_seqs]
    drafts,  # input, i32 [num_seqs, 5]
    page_table,  # input, i32 [num_seqs, 1014]
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
    BLOCK: tl.constexpr = 4
    PAGE: tl.constexpr = 64
    PAGES: tl.constexpr = 1014
    QUERY_LEN: tl.constexpr = 5
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may start
    tl.extra.cuda.gdc_wait()  # results of earlier kernels are visible

    s = tl.arange(0, BLOCK)
    ok = s < num_seqs
    src = tl.load(src_state_slots + s, mask=ok, other=0)
    ok &= src > 0  # slot 0 is padding
    count = tl.load(accepted + s, mask=ok, other=0)
    dst_ptr = dst_state_slots + s
    # All loads come before all stores: a load would wait for an earlier store.
    dst = tl.load(dst_ptr, mask=ok, other=0)
    length = tl.load(context_lens + s, mask=ok, other=0) + count + 1
    drawn = tl.load(rng_offset + s, mask=ok, other=0) + count + 1
    tokens, next_positions, pages = (), (), ()
    for i in tl.static_range(QUERY_LEN):
        position = tl.load(positions + s * QUERY_LEN + i, mask=ok, other=0) + count + 1
        page = tl.load(
            page_table + s * PAGES + tl.minimum(position // PAGE, PAGES - 1), mask=ok, other=0
        )
        tokens = tokens + (tl.load(drafts + s * QUERY_LEN + i, mask=ok, other=0),)
        next_positions, pages = next_positions + (position,), pages + (page,)
    tl.store(src_state_slots + s, dst, mask=ok)
    tl.store(dst_ptr, src, mask=ok)
    tl.store(context_lens + s, length, mask=ok)
    tl.store(rng_offset + s, drawn, mask=ok)
    for i in tl.static_range(QUERY_LEN):
        tl.store(token_ids + s * QUERY_LEN + i, tokens[i], mask=ok)
        tl.store(positions + s * QUERY_LEN + i, next_positions[i], mask=ok)
        tl.store(
            slot_mapping + s * QUERY_LEN + i,
            pages[i] * PAGE + next_positions[i] % PAGE,
            mask=ok,
        )
