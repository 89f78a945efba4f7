"""norm_linear

rms_norm: y = x / sqrt(mean(x^2) + eps) * (1 + w)
linear: y = x w^T, split into columns of the sizes `splits`
Source: RMSNorm (arXiv:1910.07467), applied to the sum at the end: (x (1 + w)) W^T / rms(x);
a product that reads each weight once

Grid: (block of columns, block of sequences). One program computes BLOCK_M x BLOCK_N of the result,
in plain arithmetic, BLOCK_K of the depth at a time.
The weight is in FP8, with an fp32 factor for each BLOCK x BLOCK elements behind them (`scales`).
K columns of x, N of the result; `m` counts sequences, `n` columns, `k` the depth, `row` rows of x.
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
def norm_linear(
    rms_norm_x,  # input, bf16 [num_seqs, 4096]
    rms_norm_w,  # weight, bf16 [4096]
    linear_w,  # weight, fp8[128x128]:fp32 [2560, 4096]
    linear_y0,  # output, bf16 [num_seqs, 2048]
    linear_y1,  # output, bf16 [num_seqs, 256]
    linear_y2,  # output, bf16 [num_seqs, 256]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK: tl.constexpr = 128
    BLOCK_K: tl.constexpr = 1024
    BLOCK_M: tl.constexpr = 1
    BLOCK_N: tl.constexpr = 4
    EPS: tl.constexpr = 1e-06
    K: tl.constexpr = 4096
    N: tl.constexpr = 2560
    RUN: tl.constexpr = 16
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may start
    n = tl.arange(0, BLOCK_N)  # columns of this program, from its first
    first = tl.program_id(0) * BLOCK_N
    n_ok = first + n < N
    weight = linear_w + first.to(tl.int64) * K
    scales = (linear_w + N * K).to(tl.pointer_type(tl.float32))
    scales += first // BLOCK * (K // BLOCK)

    k = 0 + tl.arange(0, BLOCK_K // RUN)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    w_tile = tl.load(
        weight + n[None, None, :, None] * K + k[:, None, None, :],
        mask=n_ok[None, None, :, None],
        other=0.0,
    )
    factor = tl.load(
        scales + 0 // BLOCK + tl.arange(0, BLOCK_K // RUN) // (BLOCK // RUN),
    )[:, None, None]
    tl.extra.cuda.gdc_wait()  # results of earlier kernels are visible

    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = m < num_seqs
    row = m
    acc = tl.zeros([BLOCK_K // RUN, BLOCK_M, BLOCK_N], tl.float32)
    square = tl.zeros([BLOCK_K // RUN, BLOCK_M, 1], tl.float32)
    for k0 in tl.static_range(0, K, BLOCK_K):
        x_low, x_high = _load_runs(
            rms_norm_x + row * K, k0, tl.where(m_ok, K, 0), BLOCK_K, RUN, BLOCK_M
        )
        norm_low, norm_high = _load_runs(
            rms_norm_w + tl.zeros([1], tl.int32), k0, tl.full([1], K, tl.int32), BLOCK_K, RUN, 1
        )
        if k0 + BLOCK_K < K:
            k = (k0 + BLOCK_K) + tl.arange(0, BLOCK_K // RUN)[:, None] * RUN + tl.arange(0, RUN)[None, :]
            next_w_tile = tl.load(
                weight + n[None, None, :, None] * K + k[:, None, None, :],
                mask=n_ok[None, None, :, None],
                other=0.0,
            )
            next_factor = tl.load(
                scales + (k0 + BLOCK_K) // BLOCK + tl.arange(0, BLOCK_K // RUN) // (BLOCK // RUN),
            )[:, None, None]
        tl.extra.cuda.gdc_wait()  # all loads are on their way
        a = _joined(x_low, x_high, BLOCK_K, RUN, BLOCK_M)[:, :, None, :]
        square += tl.sum(a * a, 3)
        a *= 1.0 + _joined(norm_low, norm_high, BLOCK_K, RUN, 1)[:, :, None, :]
        acc += tl.sum(w_tile.to(tl.float16).to(tl.float32) * a, 3) * factor
        if k0 + BLOCK_K < K:
            w_tile, factor = next_w_tile, next_factor
    out = tl.sum(acc, 0)
    scale = tl.rsqrt(tl.sum(square, 0) / K + EPS)
    out *= scale
    col = first + n
    ok = m_ok[:, None] & n_ok[None, :]
    offsets = m[:, None] * N + col[None, :]
    tl.store(
        linear_y0 + m[:, None] * 2048 + (col - 0)[None, :],
        out,
        mask=ok & ((col >= 0) & (col < 2048))[None, :],
    )
    tl.store(
        linear_y1 + m[:, None] * 256 + (col - 2048)[None, :],
        out,
        mask=ok & ((col >= 2048) & (col < 2304))[None, :],
    )
    tl.store(
        linear_y2 + m[:, None] * 256 + (col - 2304)[None, :],
        out,
        mask=ok & ((col >= 2304) & (col < 2560))[None, :],
    )
