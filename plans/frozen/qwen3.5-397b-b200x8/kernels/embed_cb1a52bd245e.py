"""embed

embed: y = table[token_ids]; ids of other ranks give 0
Source: a lookup; a rank holds the rows from `row_start` on (Megatron-LM, arXiv:1909.08053)
"""

import triton
import triton.language as tl


@triton.jit
def embed(
    token_ids,  # input, i32 [num_tokens]
    table,  # weight, bf16 [31040, 4096]
    y,  # output, bf16 [num_tokens, 4096]
    row_start,
    num_tokens,
    num_seqs,
):
    BLOCK_N: tl.constexpr = 4096
    H: tl.constexpr = 4096
    ROWS: tl.constexpr = 31040

    t = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(token_ids + t) - row_start
    mine = (row >= 0) & (row < ROWS)
    value = tl.load(table + row.to(tl.int64) * H + n, mask=mine & (n < H), other=0.0)
    tl.store(y + t * H + n, value, mask=n < H)
