"""advance_rows

advance_rows: `advance` by accepted + 1 tokens: `drafts` are the next rows, dst_state_slots[accepted] is read next, or the one
Source: inputs of the next step, as far on as drafts were right; rows of state change places, none is copied
"""

import triton
import triton.language as tl


@triton.jit
def advance_rows(
    accepted,  # input, i32 [num_seqs]
    drafts,  # input, i32 [num_seqs, 4]
    page_table,  # input, i32 [num_seqs, 1014]
    token_ids,  # state, i32 [num_tokens]
    positions,  # state, i32 [num_tokens]
    slot_mapping,  # state, i32 [num_tokens]
    context_lens,  # state, i32 [num_seqs]
    src_state_slots,  # state, i32 [num_seqs]
    dst_state_slots,  # state, i32 [num_seqs]
    rng_offset,  # state, i64 [num_seqs]
    num_tokens,
    num_seqs,
):
    BLOCK: tl.constexpr = 4
    PAGE: tl.constexpr = 64
    PAGES: tl.constexpr = 1014
    ROWS: tl.constexpr = 4
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may take its place on the machine
    tl.extra.cuda.gdc_wait()  # all before this one is done and visible

    s = tl.arange(0, BLOCK)
    ok = s < num_seqs
    read = tl.load(src_state_slots + s, mask=ok, other=0)
    ok &= read > 0  # others are padding
    count = tl.load(accepted + s, mask=ok, other=0)
    written = dst_state_slots + s
    # All loads, then all stores: a load waits for any store before it.
    other = tl.load(written, mask=ok, other=0)
    length = tl.load(context_lens + s, mask=ok, other=0) + count + 1
    drawn = tl.load(rng_offset + s, mask=ok, other=0) + count + 1
    tokens, places, pages = (), (), ()
    for i in tl.static_range(ROWS):
        position = tl.load(positions + s * ROWS + i, mask=ok, other=0) + count + 1
        page = tl.load(page_table + s * PAGES + tl.minimum(position // PAGE, PAGES - 1), mask=ok, other=0)
        tokens = tokens + (tl.load(drafts + s * ROWS + i, mask=ok, other=0),)
        places, pages = places + (position,), pages + (page,)
    tl.store(src_state_slots + s, other, mask=ok)
    tl.store(written, read, mask=ok)
    tl.store(context_lens + s, length, mask=ok)
    tl.store(rng_offset + s, drawn, mask=ok)
    for i in tl.static_range(ROWS):
        tl.store(token_ids + s * ROWS + i, tokens[i], mask=ok)
        tl.store(positions + s * ROWS + i, places[i], mask=ok)
        tl.store(slot_mapping + s * ROWS + i, pages[i] * PAGE + places[i] % PAGE, mask=ok)
