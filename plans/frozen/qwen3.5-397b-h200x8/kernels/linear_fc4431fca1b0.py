"""linear

linear: y = x w^T, split into columns of the sizes `splits`
Source: a product that reads each weight once

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
def linear(
    x,  # input, bf16 [num_seqs, 1024]
    w,  # weight, fp8[128x128]:fp32 [4096, 1024]
    y0,  # output, bf16 [num_seqs, 4096]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK: tl.constexpr = 128
    BLOCK_K: tl.constexpr = 1024
    BLOCK_M: tl.constexpr = 1
    BLOCK_N: tl.constexpr = 4
    K: tl.constexpr = 1024
    N: tl.constexpr = 4096
    RUN: tl.constexpr = 16
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may start
    n = tl.arange(0, BLOCK_N)  # columns of this program, from its first
    first = tl.program_id(0) * BLOCK_N
    n_ok = first + n < N
    weight = w + first.to(tl.int64) * K
    scales = (w + N * K).to(tl.pointer_type(tl.float32))
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
    for k0 in tl.static_range(0, K, BLOCK_K):
        x_low, x_high = _load_runs(
            x + row * K, k0, tl.where(m_ok, K, 0), BLOCK_K, RUN, BLOCK_M
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
        acc += tl.sum(w_tile.to(tl.float16).to(tl.float32) * a, 3) * factor
        if k0 + BLOCK_K < K:
            w_tile, factor = next_w_tile, next_factor
    out = tl.sum(acc, 0)
    col = first + n
    ok = m_ok[:, None] & n_ok[None, :]
    offsets = m[:, None] * N + col[None, :]
    tl.store(y0 + offsets, out, mask=ok)
