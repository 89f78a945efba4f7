"""advance_rows

advance_rows: `advance` by accepted + 1 tokens: `drafts` are the next rows, write_rows[accepted] is read next, or the one
Source: inputs of the next step, as far on as drafts were right; rows of state change places, none is copied
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
    read_rows,  # state, i32 [num_seqs]
    write_rows,  # state, i32 [num_seqs]
    draw,  # state, i64 [num_seqs]
    num_tokens,
    num_seqs,
):
    BLOCK: tl.constexpr = 1
    PAGE: tl.constexpr = 64
    PAGES: tl.constexpr = 1014
    ROWS: tl.constexpr = 5
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may take its place on the machine
    tl.extra.cuda.gdc_wait()  # all before this one is done and visible

    s = tl.arange(0, BLOCK)
    ok = s < num_seqs
    read = tl.load(read_rows + s, mask=ok, other=0)
    ok &= read > 0  # others are padding
    count = tl.load(accepted + s, mask=ok, other=0)
    written = write_rows + s
    tl.store(read_rows + s, tl.load(written, mask=ok, other=0), mask=ok)
    tl.store(written, read, mask=ok)
    tl.store(context_lens + s, tl.load(context_lens + s, mask=ok, other=0) + count + 1, mask=ok)
    tl.store(draw + s, tl.load(draw + s, mask=ok, other=0) + count + 1, mask=ok)
    for i in tl.static_range(ROWS):
        row = s * ROWS + i
        tl.store(token_ids + row, tl.load(drafts + row, mask=ok, other=0), mask=ok)
        position = tl.load(positions + row, mask=ok, other=0) + count + 1
        tl.store(positions + row, position, mask=ok)
        page = tl.load(page_table + s * PAGES + tl.minimum(position // PAGE, PAGES - 1), mask=ok, other=0)
        tl.store(slot_mapping + row, page * PAGE + position % PAGE, mask=ok)
