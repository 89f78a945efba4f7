"""select_rows

select_row: y[s] = x[s * R + accepted[s]]
select_row: y[s] = x[s * R + accepted[s]]
select_row: y[s] = x[s * R + accepted[s]]
Source: one row of each sequence, of several tensors in one launch

Grid: (sequence, block of BLOCK_N columns). One program copies a block of the row of the
last accepted token.
QUERY_LEN rows a sequence; `s` counts sequences, `n` columns.
"""

import triton
import triton.language as tl


@triton.jit
def select_rows(
    select_row_x,  # input, bf16 [num_tokens, 4096]
    select_row_accepted,  # input, i32 [num_seqs]
    select_row_x2,  # input, bf16 [num_tokens, 4096]
    select_row_x3,  # input, bf16 [num_tokens, 2048]
    select_row_y,  # output, bf16 [num_seqs, 4096]
    select_row_y2,  # output, bf16 [num_seqs, 4096]
    select_row_y3,  # output, bf16 [num_seqs, 2048]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK_N: tl.constexpr = 1024
    QUERY_LEN: tl.constexpr = 5
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may start
    tl.extra.cuda.gdc_wait()  # results of earlier kernels are visible

    s = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = s * QUERY_LEN + tl.load(select_row_accepted + s)
    tl.store(
        select_row_y + s * 4096 + n,
        tl.load(select_row_x + row * 4096 + n, mask=n < 4096),
        mask=n < 4096,
    )
    tl.store(
        select_row_y2 + s * 4096 + n,
        tl.load(select_row_x2 + row * 4096 + n, mask=n < 4096),
        mask=n < 4096,
    )
    tl.store(
        select_row_y3 + s * 2048 + n,
        tl.load(select_row_x3 + row * 2048 + n, mask=n < 2048),
        mask=n < 2048,
    )
