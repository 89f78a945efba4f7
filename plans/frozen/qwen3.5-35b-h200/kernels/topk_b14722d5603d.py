"""topk

topk: p = softmax(logits); ids = indices of the k largest; weights = p[ids] / sum(p[ids])
Source: softmax over the experts, the best TOP_K, divided by their sum: that of the best alone

Grid: (token). One program takes the best TOP_K of EXPERTS logits, one after the other.
BLOCK_E, BLOCK_J: EXPERTS and TOP_K as powers of two; `e` counts experts, `j` those chosen.
"""

import triton
import triton.language as tl


@triton.jit
def topk(
    logits,  # input, bf16 [num_tokens, 256]
    weights,  # output, bf16 [num_tokens, 8]
    ids,  # output, i32 [num_tokens, 8]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK_E: tl.constexpr = 256
    BLOCK_J: tl.constexpr = 8
    EXPERTS: tl.constexpr = 256
    TOP_K: tl.constexpr = 8
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may start
    tl.extra.cuda.gdc_wait()  # results of earlier kernels are visible

    t = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    j = tl.arange(0, BLOCK_J)
    left = tl.load(
        logits + t * EXPERTS + e, mask=e < EXPERTS, other=float("-inf")
    ).to(tl.float32)
    best = tl.max(left, 0)
    chosen = tl.zeros([BLOCK_J], tl.int32)
    share = tl.zeros([BLOCK_J], tl.float32)
    for n in range(TOP_K):
        value = tl.max(left, 0)
        expert = tl.min(tl.where(left == value, e, BLOCK_E), 0)
        chosen = tl.where(j == n, expert, chosen)
        share = tl.where(j == n, tl.exp(value - best), share)
        left = tl.where(e == expert, float("-inf"), left)
    tl.store(ids + t * TOP_K + j, chosen, mask=j < TOP_K)
    tl.store(weights + t * TOP_K + j, share / tl.sum(share, 0), mask=j < TOP_K)
