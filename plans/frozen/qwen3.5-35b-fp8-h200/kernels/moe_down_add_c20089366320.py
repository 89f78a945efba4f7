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
    BLOCK_N: tl.constexpr = 2
    H: tl.constexpr = 2048
    INNER: tl.constexpr = 512
    LOCAL: tl.constexpr = 256
    SHARED: tl.constexpr = 512
    TOP_K: tl.constexpr = 8

    t = tl.program_id(0)
    first = tl.program_id(1) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    ok = first + n < H
    k = tl.arange(0, BLOCK_K // BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    b = tl.arange(0, BLOCK_K // BLOCK)
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
    acc = tl.zeros([BLOCK_K // BLOCK, BLOCK_N, BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):  # unrolled, so that all experts' weights are loaded at once
        for k0 in tl.static_range(0, INNER, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K // BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
            x = tl.load(
                experts_down_h + (t * TOP_K + j) * INNER + k,
                mask=is_local[j] & (k < INNER),
                other=0.0,
            )
            w = tl.load(
                experts_down_w
                + (tl.where(is_local[j], experts[j], 0).to(tl.int64) * H + first) * INNER
                + n[None, :, None] * INNER
                + k[:, None, :],
                mask=(ok & is_local[j])[None, :, None] & (k < INNER)[:, None, :],
                other=0.0,
            )
            share = shares[j]
            b = k0 // BLOCK + tl.arange(0, BLOCK_K // BLOCK)
            factor = tl.load(
                (experts_down_w + LOCAL * (H * INNER)).to(tl.pointer_type(tl.float32))
                + tl.where(is_local[j], experts[j], 0) * (H // BLOCK * (INNER // BLOCK))
                + first // BLOCK * (INNER // BLOCK)
                + b,
                mask=b < INNER // BLOCK,
                other=0.0,
            )[:, None]
            x = x.to(tl.float32) * (factor * share)
            acc += w.to(tl.float16).to(tl.float32) * x[:, None, :]
    gate = tl.sigmoid(tl.load(gated_add_g + t).to(tl.float32))
    for k0 in tl.static_range(0, SHARED, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K // BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        w = prefetched_shared
        factor = shared_factor
        if k0 > 0:
            w = tl.load(
                linear_w + first.to(tl.int64) * SHARED + n[None, :, None] * SHARED + k[:, None, :],
                mask=ok[None, :, None] & (k < SHARED)[:, None, :],
                other=0.0,
            )
            b = k0 // BLOCK + tl.arange(0, BLOCK_K // BLOCK)
            factor = tl.load(
                (linear_w + H * SHARED).to(tl.pointer_type(tl.float32))
                + first // BLOCK * (SHARED // BLOCK)
                + b,
                mask=b < SHARED // BLOCK,
                other=0.0,
            )[:, None]
        x = tl.load(linear_x + t * SHARED + k, mask=k < SHARED, other=0.0).to(tl.float32) * gate
        acc += w.to(tl.float16).to(tl.float32) * (x * factor)[:, None, :]
    out = tl.sum(tl.sum(acc, 2), 0)
    out += tl.load(add_r + t * H + first + n, mask=ok, other=0.0).to(tl.float32)
    tl.store(add_y + t * H + first + n, out, mask=ok)
