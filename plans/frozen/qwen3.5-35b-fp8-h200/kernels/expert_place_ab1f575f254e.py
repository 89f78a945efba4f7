"""expert_place

expert_place: expert_sort of ids that expert_count has counted
Source: a counting sort, its second half, stable

Grid: (part of the tokens). One program adds up all counts to find where its pairs of each expert
begin, sorts its pairs by expert, and writes each of them behind those that come before it.
PARTS of the tokens, EXPERTS of this rank, TOP_K of a token; `i` counts (token, expert) pairs of a
part, at most BLOCK, in their order and then sorted, `e` experts and those of other ranks, `p`
parts, ROWS of them at a time.
"""

import triton
import triton.language as tl


@triton.jit
def expert_place(
    ids,  # input, i32 [num_tokens, 8]
    counts,  # input, i32 [128, 257]
    order,  # output, i32 [num_tokens, 8]
    bounds,  # output, i32 [257]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BINS: tl.constexpr = 512
    BLOCK: tl.constexpr = 2048
    EXPERTS: tl.constexpr = 256
    PARTS: tl.constexpr = 128
    ROWS: tl.constexpr = 16
    TOP_K: tl.constexpr = 8

    part = tl.program_id(0)
    length = tl.cdiv(num_tokens, PARTS) * TOP_K
    begin = part * length
    end = tl.minimum(begin + length, num_tokens * TOP_K)
    i = tl.arange(0, BLOCK)
    group = tl.load(
        ids + begin + i, mask=begin + i < end, other=EXPERTS
    )
    group = tl.where((group >= 0) & (group < EXPERTS) & (begin + i < end), group, EXPERTS)
    key = tl.sort(group * BLOCK + i)  # what is no pair comes last
    e = tl.arange(0, BINS)
    total = tl.zeros([BINS], tl.int32)
    before = tl.zeros([BINS], tl.int32)
    for p0 in range(0, PARTS, ROWS):
        p = p0 + tl.arange(0, ROWS)
        ok = (p < PARTS)[:, None] & (e <= EXPERTS)[None, :]
        found = tl.load(counts + p[:, None] * (EXPERTS + 1) + e[None, :], mask=ok, other=0)
        total += tl.sum(found, 0)
        before += tl.sum(tl.where((p < part)[:, None], found, 0), 0)
    own = tl.load(counts + part * (EXPERTS + 1) + e, mask=e <= EXPERTS, other=0)
    first = tl.cumsum(total, 0) - total
    if part == 0:
        tl.store(bounds + e, first, mask=e <= EXPERTS)
    # Pairs of an expert begin at `first`, those of this part behind those of the parts before it;
    # among its own sorted pairs they begin where those of smaller experts end.
    shift = first + before - (tl.cumsum(own, 0) - own)
    place = tl.gather(shift, key // BLOCK, 0) + i
    tl.store(order + place, begin + key % BLOCK, mask=begin + key % BLOCK < end)
