"""shift_tokens

shift_tokens: y[t] = token_ids[t + 1]; at the end of a sequence y = following, or next_tokens where
following < 0
Source: the token after each token of a chunk: in the chunk, known to the host, or just sampled

Grid: (block of BLOCK tokens, sequence). One program writes the successors of its tokens.
`s` counts sequences, `t` tokens of the batch.
"""

import triton
import triton.language as tl


@triton.jit
def shift_tokens(
    token_ids,  # input, i32 [num_tokens]
    following,  # input, i32 [num_seqs]
    next_tokens,  # input, i32 [num_seqs]
    cu_seqlens,  # input, i32 [num_seqs+1]
    y,  # output, i32 [num_tokens]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK: tl.constexpr = 1024

    s = tl.program_id(1)
    end = tl.load(cu_seqlens + s + 1)
    t = tl.load(cu_seqlens + s) + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    last = tl.load(following + s)
    last = tl.where(last >= 0, last, tl.load(next_tokens + s))
    tl.store(y + t, tl.load(token_ids + t + 1, mask=t + 1 < end, other=last), mask=t < end)
