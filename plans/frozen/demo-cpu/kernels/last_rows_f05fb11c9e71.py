"""last_rows

last_token: the last row of each sequence
last_token: the last row of each sequence
last_token: the last row of each sequence
Source: the one row of each sequence that goes on, of several tensors in one launch
"""

import triton
import triton.language as tl


@triton.jit
def last_rows(
    last_token_x,  # input, fp32 [num_tokens, 256]
    last_token_cu_seqlens,  # input, i32 [num_seqs+1]
    last_token_x2,  # input, fp32 [num_tokens, 256]
    last_token_x3,  # input, fp32 [num_tokens, 256]
    last_token_y,  # output, fp32 [num_seqs, 256]
    last_token_y2,  # output, fp32 [num_seqs, 256]
    last_token_y3,  # output, fp32 [num_seqs, 256]
    num_tokens,
    num_seqs,
):
    BLOCK_N: tl.constexpr = 256

    s = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(last_token_cu_seqlens + s + 1) - 1
    tl.store(last_token_y + s * 256 + n, tl.load(last_token_x + row * 256 + n, mask=n < 256), mask=n < 256)
    tl.store(last_token_y2 + s * 256 + n, tl.load(last_token_x2 + row * 256 + n, mask=n < 256), mask=n < 256)
    tl.store(last_token_y3 + s * 256 + n, tl.load(last_token_x3 + row * 256 + n, mask=n < 256), mask=n < 256)
