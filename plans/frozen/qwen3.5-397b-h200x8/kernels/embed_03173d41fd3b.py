"""embed

embed: y = table[token_ids]; a token that another rank holds gives 0
Source: a lookup; a rank holds the rows from `row_start` on (Megatron-LM, arXiv:1909.08053)

Grid: (token, block of BLOCK_N dimensions). One program copies a block of one token's embedding.
H hidden size, VOCAB tokens in this rank's part of the table; a token of another rank gives zeros.
"""

import triton
import triton.language as tl


@triton.jit
def embed(
    token_ids,  # input, i32 [num_seqs, 4]
    table,  # weight, bf16 [31040, 4096]
    y,  # output, bf16 [num_seqs, 4096]
    row_start,  # rank_constant, i32
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK_N: tl.constexpr = 4096
    H: tl.constexpr = 4096
    VOCAB: tl.constexpr = 31040
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may start
    tl.extra.cuda.gdc_wait()  # results of earlier kernels are visible

    t = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(token_ids + t * 4 + 3) - row_start
    mine = (row >= 0) & (row < VOCAB)
    value = tl.load(table + row.to(tl.int64) * H + n, mask=mine & (n < H), other=0.0)
    tl.store(y + t * H + n, value, mask=n < H)
