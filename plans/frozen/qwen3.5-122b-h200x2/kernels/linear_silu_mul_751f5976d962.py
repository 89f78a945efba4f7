"""linear_silu_mul

linear: y = x w^T, split into columns of the sizes `splits`
silu_mul: y = silu(x[:, :n]) * x[:, n:]
Source: SwiGLU (arXiv:2002.05202); a product that reads each weight once

Grid: (block of columns, block of tokens). One program computes BLOCK_M x BLOCK_N of the result,
in plain arithmetic, BLOCK_K of the depth at a time.
K columns of x, N of the result; `m` counts tokens, `n` columns, `k` the depth, `row` rows of x.
"""

import triton
import triton.language as tl


@triton.jit
def linear_silu_mul(
    linear_x,  # input, bf16 [num_tokens, 3072]
    linear_w,  # weight, bf16 [1024, 3072]
    silu_mul_y,  # output, bf16 [num_tokens, 512]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK_K: tl.constexpr = 1024
    BLOCK_M: tl.constexpr = 8
    BLOCK_N: tl.constexpr = 2
    K: tl.constexpr = 3072
    N: tl.constexpr = 512
    STAGES: tl.constexpr = 3
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may start
    n = tl.arange(0, BLOCK_N)  # columns of this program, from its first
    first = tl.program_id(0) * BLOCK_N
    n_ok = first + n < N
    weight = linear_w + first.to(tl.int64) * K
    k = tl.arange(0, BLOCK_K)
    prefetched = tl.load(
        weight + n[None, :, None] * K + k[None, None, :],
        mask=n_ok[None, :, None],
        other=0.0,
    )
    prefetched_up = tl.load(
        weight + N * K + n[None, :, None] * K + k[None, None, :],
        mask=n_ok[None, :, None],
        other=0.0,
    )
    tl.extra.cuda.gdc_wait()  # results of earlier kernels are visible

    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = m < num_tokens
    row = m
    acc = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], tl.float32)
    acc_up = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], tl.float32)
    a = tl.load(
        linear_x + row[:, None, None] * K + k[None, None, :],
        mask=m_ok[:, None, None],
        other=0.0,
    ).to(tl.float32)
    acc += prefetched.to(tl.float32) * a
    acc_up += prefetched_up.to(tl.float32) * a
    for k0 in tl.range(BLOCK_K, K, BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(
            linear_x + row[:, None, None] * K + k[None, None, :],
            mask=m_ok[:, None, None],
            other=0.0,
        ).to(tl.float32)

        w_tile = tl.load(
            weight + n[None, :, None] * K + k[None, None, :],
            mask=n_ok[None, :, None],
            other=0.0,
        )
        acc += w_tile.to(tl.float32) * a
        up_tile = tl.load(
            weight + N * K + n[None, :, None] * K + k[None, None, :],
            mask=n_ok[None, :, None],
            other=0.0,
        )
        acc_up += up_tile.to(tl.float32) * a
    out = tl.sum(acc, 2)
    up = tl.sum(acc_up, 2)
    out = out * tl.sigmoid(out) * up
    col = first + n
    ok = m_ok[:, None] & n_ok[None, :]
    offsets = m[:, None] * N + col[None, :]
    tl.store(silu_mul_y + offsets, out, mask=ok)
