"""expert_count

expert_count: counts[p, e] = how often the p-th part of the tokens chooses expert e; the last column
counts experts of other ranks
Source: a counting sort, its first half

Grid: (part of the tokens). One program counts how often its tokens choose each expert.
PARTS of the tokens, EXPERTS of this rank, TOP_K of a token; `i` counts (token, expert) pairs of a
part, at most BLOCK, `e` counts experts, and one more for pairs of experts that other ranks hold.
"""

import triton
import triton.language as tl


@triton.jit
def expert_count(
    ids,  # input, i32 [num_tokens, 8]
    counts,  # output, i32 [128, 257]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BINS: tl.constexpr = 512
    BLOCK: tl.constexpr = 2048
    EXPERTS: tl.constexpr = 256
    PARTS: tl.constexpr = 128
    TOP_K: tl.constexpr = 8

    part = tl.program_id(0)
    length = tl.cdiv(num_tokens, PARTS) * TOP_K
    i = tl.arange(0, BLOCK)
    ok = (i < length) & (part * length + i < num_tokens * TOP_K)
    group = tl.load(
        ids + part * length + i, mask=ok, other=0
    )
    group = tl.where((group >= 0) & (group < EXPERTS), group, EXPERTS)
    e = tl.arange(0, BINS)
    found = tl.histogram(tl.where(ok, group, EXPERTS + 1), BINS)
    tl.store(counts + part * (EXPERTS + 1) + e, found, mask=e <= EXPERTS)
