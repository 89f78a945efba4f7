"""expert_sort

expert_sort: order = flat indices into ids sorted by expert, those of other ranks last; bounds[e] =
first index of expert e
Source: a counting sort, stable

Grid: (expert), and one more for pairs of experts that other ranks hold. One program finds where its
expert's pairs begin, and writes them there in order.
EXPERTS of this rank, TOP_K of a token; `i` counts (token, expert) pairs, BLOCK of them at a time.
"""

import triton
import triton.language as tl


@triton.jit
def expert_sort(
    ids,  # input, i32 [num_tokens, 8]
    order,  # output, i32 [num_tokens, 8]
    bounds,  # output, i32 [257]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK: tl.constexpr = 256
    EXPERTS: tl.constexpr = 256
    TOP_K: tl.constexpr = 8
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may start
    tl.extra.cuda.gdc_wait()  # results of earlier kernels are visible

    expert = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    size = num_tokens * TOP_K
    start = tl.zeros([BLOCK], tl.int32)
    for i0 in range(0, size, BLOCK):
        group = tl.load(
            ids + i0 + i, mask=i0 + i < size, other=EXPERTS
        )
        group = tl.where((group >= 0) & (group < EXPERTS) & (i0 + i < size), group, EXPERTS)
        start += (group < expert).to(tl.int32)
    offset = tl.sum(start, 0)
    tl.store(bounds + expert, offset)
    for i0 in range(0, size, BLOCK):
        group = tl.load(
            ids + i0 + i, mask=i0 + i < size, other=EXPERTS
        )
        group = tl.where((group >= 0) & (group < EXPERTS), group, EXPERTS)
        mine = ((group == expert) & (i0 + i < size)).to(tl.int32)
        tl.store(order + offset + tl.cumsum(mine, 0) - 1, i0 + i, mask=mine > 0)
        offset += tl.sum(mine, 0)
