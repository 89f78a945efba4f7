"""moe_up

topk: softmax, k largest, divided by their sum
experts_up: y[t, j] = silu(x G^T) * (x U^T) of expert ids[t, j]
linear: y = x w^T, cut into `splits` columns
silu_mul: y = silu(x[:, :n]) * x[:, n:]
Source: mixture of experts, SwiGLU (arXiv:2002.05202): a program finds its expert itself, so no launch waits between
"""

import triton
import triton.language as tl


@triton.jit
def moe_up(
    topk_logits,  # input, bf16 [num_tokens, 512]
    experts_up_x,  # input, bf16 [num_tokens, 4096]
    experts_up_w,  # weight, bf16 [512, 256, 4096]
    linear_w,  # weight, bf16 [256, 4096]
    topk_weights,  # output, bf16 [num_tokens, 10]
    topk_ids,  # output, i32 [num_tokens, 10]
    experts_up_y,  # output, bf16 [num_tokens, 1280]
    silu_mul_y,  # output, bf16 [num_tokens, 128]
    num_tokens,
    num_seqs,
):
    BLOCK_E: tl.constexpr = 512
    BLOCK_J: tl.constexpr = 16
    BLOCK_K: tl.constexpr = 512
    BLOCK_N: tl.constexpr = 4
    EXPERTS: tl.constexpr = 512
    H: tl.constexpr = 4096
    INNER: tl.constexpr = 128
    LOCAL: tl.constexpr = 512
    SHARED: tl.constexpr = 128
    STAGES: tl.constexpr = 3
    TOP_K: tl.constexpr = 10
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may take its place on the machine
    tl.extra.cuda.gdc_wait()  # all before this one is done and visible

    slot, t = tl.program_id(1), tl.program_id(2)
    e = tl.arange(0, BLOCK_E)
    j = tl.arange(0, BLOCK_J)
    left = tl.load(topk_logits + t * EXPERTS + e, mask=e < EXPERTS, other=float("-inf")).to(tl.float32)
    best = tl.max(left, 0)
    chosen = tl.zeros([BLOCK_J], tl.int32)
    share = tl.zeros([BLOCK_J], tl.float32)
    for r in range(TOP_K):
        value = tl.max(left, 0)
        expert = tl.min(tl.where(left == value, e, BLOCK_E), 0)
        chosen = tl.where(j == r, expert, chosen)
        share = tl.where(j == r, tl.exp(value - best), share)
        left = tl.where(e == expert, float("-inf"), left)
    first = tl.program_id(0) * BLOCK_N
    if (slot == 0) & (first == 0):
        tl.store(topk_ids + t * TOP_K + j, chosen, mask=j < TOP_K)
        tl.store(topk_weights + t * TOP_K + j, share / tl.sum(share, 0), mask=j < TOP_K)
    n = tl.arange(0, BLOCK_N)
    if slot < TOP_K:
        mine = tl.sum(tl.where(j == slot, chosen, 0), 0)
        there = (mine >= 0) & (mine < LOCAL)
        weight = experts_up_w + tl.where(there, mine, 0).to(tl.int64) * (2 * INNER * H) + first * H
        half = INNER
    else:
        there = slot == TOP_K
        weight = linear_w + first.to(tl.int64) * H
        half = SHARED
    ok = n < half - first
    gate = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for k0 in tl.range(0, H, BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(experts_up_x + t * H + k, mask=k < H, other=0.0).to(tl.float32)
        mask = (ok & there)[:, None] & (k < H)[None, :]
        place = n[:, None] * H + k[None, :]
        gate += tl.load(weight + place, mask=mask, other=0.0).to(tl.float32) * x[None, :]
        up += tl.load(weight + half * H + place, mask=mask, other=0.0).to(tl.float32) * x[None, :]
    out = tl.sum(gate, 1)
    out = out * tl.sigmoid(out) * tl.sum(up, 1)
    if slot < TOP_K:
        tl.store(experts_up_y + (t * TOP_K + slot) * INNER + first + n, out, mask=ok)
    else:
        tl.store(silu_mul_y + t * SHARED + first + n, out, mask=ok)
