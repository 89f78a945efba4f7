"""moe_down_add

experts_down: y[t] = sum_j weights[t, j] h[t, j] D^T, D of expert ids[t, j]
linear: y = x w^T, split into columns of the sizes `splits`
gated_add: y = r + x * sigmoid(g), g one scalar for each token
add: y = x + r
Source: mixture of experts: the weighted sum of the chosen experts, and the gated shared one

Grid: (token, block of columns), tokens side by side, so that those with the same expert share its
reads. One program computes BLOCK_N columns of one token, over all its experts.
H hidden size, INNER and SHARED inner sizes of a routed and the shared expert, LOCAL experts of this
rank, TOP_K of a token; `n` counts columns,
`k` inner dimensions, `j` experts of the token.
Weights are in FP8, with an fp32 factor for each BLOCK x BLOCK elements behind them; `b` counts
blocks of the depth.
"""

import triton
import triton.language as tl


@triton.jit
def _runs(x_ptr, k0, end, BLOCK_K: tl.constexpr, RUN: tl.constexpr):
    """BLOCK_K elements of a row from k0 on, in runs; those from `end` on are 0.

    It loads half runs: a thread then has what it multiplies with its run of the weight, and nothing
    goes through shared memory.
    """
    run = k0 + tl.arange(0, BLOCK_K // RUN) * RUN
    half = x_ptr + run[:, None] + tl.arange(0, RUN // 2)[None, :]
    ok = (run < end)[:, None]
    low = tl.load(half, mask=ok, other=0.0)
    high = tl.load(half + RUN // 2, mask=ok, other=0.0)
    both = tl.permute(tl.join(low, high), (0, 2, 1))
    return tl.reshape(both, (BLOCK_K // RUN, RUN)).to(tl.float32)


@triton.jit
def moe_down_add(
    experts_down_h,  # input, bf16 [num_seqs, 4096]
    experts_down_ids,  # input, i32 [num_seqs, 8]
    experts_down_weights,  # input, bf16 [num_seqs, 8]
    linear_x,  # input, bf16 [num_seqs, 512]
    gated_add_g,  # input, bf16 [num_seqs, 1]
    add_r,  # input, bf16 [num_seqs, 2048]
    experts_down_w,  # weight, fp8[128x128]:fp32 [256, 2048, 512]
    linear_w,  # weight, fp8[128x128]:fp32 [2048, 512]
    add_y,  # output, bf16 [num_seqs, 2048]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK: tl.constexpr = 128
    BLOCK_K: tl.constexpr = 512
    BLOCK_N: tl.constexpr = 8
    H: tl.constexpr = 2048
    INNER: tl.constexpr = 512
    LOCAL: tl.constexpr = 256
    RUN: tl.constexpr = 16
    SHARED: tl.constexpr = 512
    TOP_K: tl.constexpr = 8

    t = tl.program_id(0)
    first = tl.program_id(1) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    ok = first + n < H
    k = tl.arange(0, BLOCK_K // RUN)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    b = tl.arange(0, BLOCK_K // RUN) // (BLOCK // RUN)
    prefetched_shared = tl.load(
        linear_w + first.to(tl.int64) * SHARED + n[None, :, None] * SHARED + k[:, None, :],
        mask=ok[None, :, None] & (k < SHARED)[:, None, :],
        other=0.0,
    )
    shared_factor = tl.load(
        (linear_w + H * SHARED).to(tl.pointer_type(tl.float32))
        + first // BLOCK * (SHARED // BLOCK)
        + b,
        mask=b < SHARED // BLOCK,
        other=0.0,
    )[:, None]
    experts, is_local, shares = (), (), ()
    for j in tl.static_range(TOP_K):
        experts = experts + (tl.load(experts_down_ids + t * TOP_K + j),)
        is_local = is_local + ((experts[j] >= 0) & (experts[j] < LOCAL),)
        shares = shares + (tl.load(experts_down_weights + t * TOP_K + j).to(tl.float32),)
    acc = tl.zeros([BLOCK_K // RUN, BLOCK_N], tl.float32)
    for j in tl.static_range(TOP_K):  # unrolled, so that all experts' weights are loaded at once
        for k0 in tl.static_range(0, INNER, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K // RUN)[:, None] * RUN + tl.arange(0, RUN)[None, :]
            x = _runs(
                experts_down_h + (t * TOP_K + j) * INNER,
                k0,
                tl.where(is_local[j], INNER, 0),
                BLOCK_K,
                RUN,
            )
            w = tl.load(
                experts_down_w
                + (tl.where(is_local[j], experts[j], 0).to(tl.int64) * H + first) * INNER
                + n[None, :, None] * INNER
                + k[:, None, :],
                mask=(ok & is_local[j])[None, :, None] & (k < INNER)[:, None, :],
                other=0.0,
            )
            b = k0 // BLOCK + tl.arange(0, BLOCK_K // RUN) // (BLOCK // RUN)
            factor = tl.load(
                (experts_down_w + LOCAL * (H * INNER)).to(tl.pointer_type(tl.float32))
                + tl.where(is_local[j], experts[j], 0) * (H // BLOCK * (INNER // BLOCK))
                + first // BLOCK * (INNER // BLOCK)
                + b,
                mask=b < INNER // BLOCK,
                other=0.0,
            )[:, None]
            acc += tl.sum(w.to(tl.float16).to(tl.float32) * x[:, None, :], 2) * (factor * shares[j])
    gate = tl.sigmoid(tl.load(gated_add_g + t).to(tl.float32))
    for k0 in tl.static_range(0, SHARED, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K // RUN)[:, None] * RUN + tl.arange(0, RUN)[None, :]
        w = prefetched_shared
        factor = shared_factor
        if k0 > 0:
            w = tl.load(
                linear_w + first.to(tl.int64) * SHARED + n[None, :, None] * SHARED + k[:, None, :],
                mask=ok[None, :, None] & (k < SHARED)[:, None, :],
                other=0.0,
            )
            b = k0 // BLOCK + tl.arange(0, BLOCK_K // RUN) // (BLOCK // RUN)
            factor = tl.load(
                (linear_w + H * SHARED).to(tl.pointer_type(tl.float32))
                + first // BLOCK * (SHARED // BLOCK)
                + b,
                mask=b < SHARED // BLOCK,
                other=0.0,
            )[:, None]
        x = _runs(linear_x + t * SHARED, k0, SHARED, BLOCK_K, RUN)
        acc += tl.sum(w.to(tl.float16).to(tl.float32) * x[:, None, :], 2) * (factor * gate)
    out = tl.sum(acc, 0)
    out += tl.load(add_r + t * H + first + n, mask=ok, other=0.0).to(tl.float32)
    tl.store(add_y + t * H + first + n, out, mask=ok)
