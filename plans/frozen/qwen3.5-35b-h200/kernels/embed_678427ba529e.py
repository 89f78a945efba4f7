"""embed

embed: y = table[token_ids]; ids of other ranks give 0
Source: a lookup; a rank holds the rows from `row_start` on (Megatron-LM, arXiv:1909.08053)
"""

import triton
import triton.language as tl


@triton.jit
def embed(
    token_ids,  # input, i32 [num_tokens]
    table,  # weight, bf16 [248320, 2048]
    y,  # output, bf16 [num_tokens, 2048]
    num_tokens,
    num_seqs,
):
    BLOCK_N: tl.constexpr = 2048
    H: tl.constexpr = 2048
    ROWS: tl.constexpr = 248320

    t = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(token_ids + t)
    mine = (row >= 0) & (row < ROWS)
    value = tl.load(table + row.to(tl.int64) * H + n, mask=mine & (n < H), other=0.0)
    tl.store(y + t * H + n, value, mask=n < H)
