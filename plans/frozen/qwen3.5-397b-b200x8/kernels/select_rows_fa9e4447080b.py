"""select_rows

select_row: y[s] = x[s * R + accepted[s]]
select_row: y[s] = x[s * R + accepted[s]]
select_row: y[s] = x[s * R + accepted[s]]
Source: the one row of each sequence that goes on, of several tensors in one launch
"""

import triton
import triton.language as tl


@triton.jit
def select_rows(
    select_row_x,  # input, bf16 [num_tokens, 1024]
    select_row_accepted,  # input, i32 [num_seqs]
    select_row_x2,  # input, bf16 [num_tokens, 1024]
    select_row_x3,  # input, bf16 [num_tokens, 4096]
    select_row_y,  # output, bf16 [num_seqs, 1024]
    select_row_y2,  # output, bf16 [num_seqs, 1024]
    select_row_y3,  # output, bf16 [num_seqs, 4096]
    num_tokens,
    num_seqs,
):
    BLOCK_N: tl.constexpr = 1024
    ROWS: tl.constexpr = 5
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may take its place on the machine
    tl.extra.cuda.gdc_wait()  # all before this one is done and visible

    s = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = s * ROWS + tl.load(select_row_accepted + s)
    tl.store(select_row_y + s * 1024 + n, tl.load(select_row_x + row * 1024 + n, mask=n < 1024), mask=n < 1024)
    tl.store(select_row_y2 + s * 1024 + n, tl.load(select_row_x2 + row * 1024 + n, mask=n < 1024), mask=n < 1024)
    tl.store(select_row_y3 + s * 4096 + n, tl.load(select_row_x3 + row * 4096 + n, mask=n < 4096), mask=n < 4096)
