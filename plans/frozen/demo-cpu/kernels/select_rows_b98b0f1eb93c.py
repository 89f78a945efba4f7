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
    select_row_x,  # input, fp32 [num_tokens, 256]
    select_row_accepted,  # input, i32 [num_seqs]
    select_row_x2,  # input, fp32 [num_tokens, 256]
    select_row_x3,  # input, fp32 [num_tokens, 256]
    select_row_y,  # output, fp32 [num_seqs, 256]
    select_row_y2,  # output, fp32 [num_seqs, 256]
    select_row_y3,  # output, fp32 [num_seqs, 256]
    num_tokens,
    num_seqs,
):
    BLOCK_N: tl.constexpr = 256
    ROWS: tl.constexpr = 3

    s = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = s * ROWS + tl.load(select_row_accepted + s)
    tl.store(select_row_y + s * 256 + n, tl.load(select_row_x + row * 256 + n, mask=n < 256), mask=n < 256)
    tl.store(select_row_y2 + s * 256 + n, tl.load(select_row_x2 + row * 256 + n, mask=n < 256), mask=n < 256)
    tl.store(select_row_y3 + s * 256 + n, tl.load(select_row_x3 + row * 256 + n, mask=n < 256), mask=n < 256)
