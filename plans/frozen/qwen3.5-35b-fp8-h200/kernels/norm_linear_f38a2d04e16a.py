"""norm_linear

rms_norm: y = x / sqrt(mean(x^2) + eps) * (1 + w)
linear: y = x w^T, split into columns of the sizes `splits`
Source: RMSNorm (arXiv:1910.07467), applied to the sum at the end: (x (1 + w)) W^T / rms(x);
a product that reads each weight once

Grid: (block of columns, block of tokens). One program computes BLOCK_M x BLOCK_N of the result,
in plain arithmetic, BLOCK_K of the depth at a time.
K columns of x, N of the result; `m` counts tokens, `n` columns, `k` the depth, `row` rows of x.
"""

import triton
import triton.language as tl


@triton.jit
def norm_linear(
    rms_norm_x,  # input, bf16 [num_tokens, 2048]
    rms_norm_w,  # weight, bf16 [2048]
    linear_w,  # weight, bf16 [257, 2048]
    rms_norm_y,  # output, bf16 [num_tokens, 2048]
    linear_y0,  # output, bf16 [num_tokens, 256]
    linear_y1,  # output, bf16 [num_tokens, 1]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK_K: tl.constexpr = 2048
    BLOCK_M: tl.constexpr = 4
    BLOCK_N: tl.constexpr = 1
    EPS: tl.constexpr = 1e-06
    K: tl.constexpr = 2048
    N: tl.constexpr = 257
    STAGES: tl.constexpr = 2
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
    prefetched_norm = 1.0 + tl.load(rms_norm_w + k[None, None, :]).to(tl.float32)
    tl.extra.cuda.gdc_wait()  # results of earlier kernels are visible

    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = m < num_tokens
    row = m
    acc = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], tl.float32)
    square = tl.zeros([BLOCK_M, 1, BLOCK_K], tl.float32)
    a = tl.load(
        rms_norm_x + row[:, None, None] * K + k[None, None, :],
        mask=m_ok[:, None, None],
        other=0.0,
    ).to(tl.float32)
    square += a * a
    a *= prefetched_norm
    acc += prefetched.to(tl.float32) * a
    for k0 in tl.range(BLOCK_K, K, BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(
            rms_norm_x + row[:, None, None] * K + k[None, None, :],
            mask=m_ok[:, None, None],
            other=0.0,
        ).to(tl.float32)
        square += a * a
        a *= 1.0 + tl.load(rms_norm_w + k[None, None, :]).to(tl.float32)

        w_tile = tl.load(
            weight + n[None, :, None] * K + k[None, None, :],
            mask=n_ok[None, :, None],
            other=0.0,
        )
        acc += w_tile.to(tl.float32) * a
    out = tl.sum(acc, 2)
    scale = tl.rsqrt(tl.sum(square, 2) / K + EPS)
    out *= scale
    col = first + n
    ok = m_ok[:, None] & n_ok[None, :]
    offsets = m[:, None] * N + col[None, :]
    tl.store(
        linear_y0 + m[:, None] * 256 + (col - 0)[None, :],
        out,
        mask=ok & ((col >= 0) & (col < 256))[None, :],
    )
    tl.store(
        linear_y1 + m[:, None] * 1 + (col - 256)[None, :],
        out,
        mask=ok & ((col >= 256) & (col < 257))[None, :],
    )
    if first == 0:  # one program writes the normalised x, which later kernels read
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            a = tl.load(
                rms_norm_x + row[:, None, None] * K + k[None, None, :],
                mask=m_ok[:, None, None],
                other=0.0,
            ).to(tl.float32)
            norm_w = 1.0 + tl.load(rms_norm_w + k[None, None, :]).to(tl.float32)
            a *= scale[:, :, None] * norm_w
            tl.store(
                rms_norm_y + row[:, None, None] * K + k[None, None, :],
                a,
                mask=m_ok[:, None, None],
            )
