"""moe_down_add

experts_down: y[t] = sum_j weights[t, j] h[t, j] D^T, D of expert ids[t, j]
linear: y = x w^T, split into columns of the sizes `splits`
gated_add: y = r + x * sigmoid(g), g one scalar for each token
add: y = x + r
Source: mixture of experts: the weighted sum of the chosen experts, and the gated shared one

Grid: (token, block of columns), tokens side by side, so that those with the same expert share its
reads. One program computes BLOCK_N columns of one token, over all its experts.
H hidden size, INNER and SHARED inner sizes of a routed and the shared expert, LOCAL experts of this
rank, TOP_K of a token (BLOCK_J: as a power of two); `n` counts
columns, `k` inner dimensions, `j` experts of the token.
Weights are in FP8, with an fp32 factor for each BLOCK x BLOCK elements behind them; `b` counts
blocks of the depth.
"""

import triton
import triton.language as tl


@triton.jit
def _load_runs(
    x_ptr, k0, end, BLOCK_K: tl.constexpr, RUN: tl.constexpr, BLOCK_M: tl.constexpr
):
    """BLOCK_K elements of each row from k0 on, in two halves of each run; those from `end` on are 0.

    A thread then has what it multiplies with its run of the weight, and nothing goes through shared
    memory.
    """
    run = k0 + tl.arange(0, BLOCK_K // RUN) * RUN
    half = x_ptr[None, :, None] + run[:, None, None] + tl.arange(0, RUN // 2)[None, None, :]
    ok = run[:, None, None] < end[None, :, None]
    low = tl.load(half, mask=ok, other=0.0)
    return low, tl.load(half + RUN // 2, mask=ok, other=0.0)


@triton.jit
def _joined(low, high, BLOCK_K: tl.constexpr, RUN: tl.constexpr, BLOCK_M: tl.constexpr):
    """Runs of the two halves of each."""
    both = tl.permute(tl.join(low, high), (0, 1, 3, 2))
    return tl.reshape(both, (BLOCK_K // RUN, BLOCK_M, RUN)).to(tl.float32)


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
    BLOCK_J: tl.constexpr = 8
    BLOCK_K: tl.constexpr = 512
    BLOCK_N: tl.constexpr = 8
    H: tl.constexpr = 2048
    INNER: tl.constexpr = 512
    LOCAL: tl.constexpr = 256
    RUN: tl.constexpr = 16
    SHARED: tl.constexpr = 512
    TOP_K: tl.constexpr = 8
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may start
    t = tl.program_id(0)
    first = tl.program_id(1) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_J)
    ok = first + n < H
    k = tl.arange(0, BLOCK_K // RUN)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    b = tl.arange(0, BLOCK_K // RUN) // (BLOCK // RUN)
    shared_w = tl.load(
        linear_w + first.to(tl.int64) * SHARED + n[None, :, None] * SHARED + k[:, None, :],
        mask=ok[None, :, None] & (k < SHARED)[:, None, :],
        other=0.0,
    )
    shared_factor = tl.load(
        (linear_w + H * SHARED).to(tl.pointer_type(tl.float32)) + first // BLOCK * (SHARED // BLOCK) + b,
        mask=b < SHARED // BLOCK,
        other=0.0,
    )
    tl.extra.cuda.gdc_wait()  # results of earlier kernels are visible

    expert = tl.load(experts_down_ids + t * TOP_K + j, mask=j < TOP_K, other=-1)
    share = tl.load(experts_down_weights + t * TOP_K + j, mask=j < TOP_K, other=0.0).to(tl.float32)
    is_local = (j < TOP_K) & (expert >= 0) & (expert < LOCAL)
    expert = tl.where(is_local, expert, 0)
    x = experts_down_h + t * (TOP_K * INNER) + j * INNER
    end = tl.where(is_local, INNER, 0)
    out = tl.zeros([BLOCK_N], tl.float32)
    for k0 in tl.static_range(0, INNER, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K // RUN)[:, None] * RUN + tl.arange(0, RUN)[None, :]
        b = k0 // BLOCK + tl.arange(0, BLOCK_K // RUN) // (BLOCK // RUN)
        w = tl.load(
            experts_down_w
            + (expert.to(tl.int64) * H + first)[None, :, None, None] * INNER
            + n[None, None, :, None] * INNER
            + k[:, None, None, :],
            mask=is_local[None, :, None, None] & ok[None, None, :, None] & (k < INNER)[:, None, None, :],
            other=0.0,
        )
        factor = tl.load(
            (experts_down_w + LOCAL * (H * INNER)).to(tl.pointer_type(tl.float32))
            + (expert * (H // BLOCK) + first // BLOCK)[None, :] * (INNER // BLOCK)
            + b[:, None],
            mask=(b < INNER // BLOCK)[:, None],
            other=0.0,
        )
        low, high = _load_runs(x, k0, end, BLOCK_K, RUN, BLOCK_J)
        tl.extra.cuda.gdc_wait()  # all loads are on their way
        runs = _joined(low, high, BLOCK_K, RUN, BLOCK_J)[:, :, None, :]
        sums = tl.sum(w.to(tl.float16).to(tl.float32) * runs, 3) * (factor * share[None, :])[:, :, None]
        # As one dimension: a thread adds up its experts before it exchanges sums with others.
        out += tl.sum(tl.reshape(sums, (BLOCK_K // RUN * BLOCK_J, BLOCK_N)), 0)
    gate = tl.sigmoid(tl.load(gated_add_g + t).to(tl.float32))
    for k0 in tl.static_range(0, SHARED, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K // RUN)[:, None] * RUN + tl.arange(0, RUN)[None, :]
        if k0 > 0:
            b = k0 // BLOCK + tl.arange(0, BLOCK_K // RUN) // (BLOCK // RUN)
            shared_w = tl.load(
                linear_w + first.to(tl.int64) * SHARED + n[None, :, None] * SHARED + k[:, None, :],
                mask=ok[None, :, None] & (k < SHARED)[:, None, :],
                other=0.0,
            )
            shared_factor = tl.load(
                (linear_w + H * SHARED).to(tl.pointer_type(tl.float32)) + first // BLOCK * (SHARED // BLOCK) + b,
                mask=b < SHARED // BLOCK,
                other=0.0,
            )
        # Each thread loads what it multiplies with its run of the weight.
        at = tl.broadcast_to(k[:, None, :], shared_w.shape)
        shared_x = tl.load(linear_x + t * SHARED + at, mask=at < SHARED, other=0.0).to(tl.float32)
        sums = tl.sum(shared_w.to(tl.float16).to(tl.float32) * shared_x, 2)
        out += tl.sum(sums * shared_factor[:, None], 0) * gate
    out += tl.load(add_r + t * H + first + n, mask=ok, other=0.0).to(tl.float32)
    tl.store(add_y + t * H + first + n, out, mask=ok)
