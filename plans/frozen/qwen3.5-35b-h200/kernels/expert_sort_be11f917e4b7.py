"""expert_sort

expert_sort: flat places of `ids` by expert, other ranks' last; bounds[e] is where expert e begins
Source: a counting sort, stable: one program an expert, and a last one for what other ranks hold
"""

import triton
import triton.language as tl


@triton.jit
def expert_sort(
    ids,  # input, i32 [num_tokens, 8]
    order,  # output, i32 [num_tokens, 8]
    bounds,  # output, i32 [257]
    num_tokens,
    num_seqs,
):
    BLOCK: tl.constexpr = 8192
    EXPERTS: tl.constexpr = 256
    TOP_K: tl.constexpr = 8

    expert = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    size = num_tokens * TOP_K
    start = tl.zeros([BLOCK], tl.int32)
    for i0 in range(0, size, BLOCK):
        group = tl.load(ids + i0 + i, mask=i0 + i < size, other=EXPERTS)
        group = tl.where((group >= 0) & (group < EXPERTS) & (i0 + i < size), group, EXPERTS)
        start += (group < expert).to(tl.int32)
    place = tl.sum(start, 0)
    tl.store(bounds + expert, place)
    for i0 in range(0, size, BLOCK):
        group = tl.load(ids + i0 + i, mask=i0 + i < size, other=EXPERTS)
        group = tl.where((group >= 0) & (group < EXPERTS), group, EXPERTS)
        mine = ((group == expert) & (i0 + i < size)).to(tl.int32)
        tl.store(order + place + tl.cumsum(mine, 0) - 1, i0 + i, mask=mine > 0)
        place += tl.sum(mine, 0)
