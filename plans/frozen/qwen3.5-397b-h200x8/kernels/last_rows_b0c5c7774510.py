"""last_rows

last_token: y[s] = x[cu_seqlens[s + 1] - 1]
last_token: y[s] = x[cu_seqlens[s + 1] - 1]
last_token: y[s] = x[cu_seqlens[s + 1] - 1]
Source: one row of each sequence, of several tensors in one launch

Grid: (sequence, block of BLOCK_N columns). One program copies a block of the row of the
last token.
`s` counts sequences, `n` columns.
"""

import triton
import triton.language as tl


@triton.jit
def last_rows(
    last_token_x,  # input, bf16 [num_tokens, 1024]
    last_token_cu_seqlens,  # input, i32 [num_seqs+1]
    last_token_x2,  # input, bf16 [num_tokens, 1024]
    last_token_x3,  # input, bf16 [num_tokens, 4096]
    last_token_y,  # output, bf16 [num_seqs, 1024]
    last_token_y2,  # output, bf16 [num_seqs, 1024]
    last_token_y3,  # output, bf16 [num_seqs, 4096]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK_N: tl.constexpr = 1024

    s = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(last_token_cu_seqlens + s + 1) - 1
    tl.store(
        last_token_y + s * 1024 + n,
        tl.load(last_token_x + row * 1024 + n, mask=n < 1024),
        mask=n < 1024,
    )
    tl.store(
        last_token_y2 + s * 1024 + n,
        tl.load(last_token_x2 + row * 1024 + n, mask=n < 1024),
        mask=n < 1024,
    )
    tl.store(
        last_token_y3 + s * 4096 + n,
        tl.load(last_token_x3 + row * 4096 + n, mask=n < 4096),
        mask=n < 4096,
    )
