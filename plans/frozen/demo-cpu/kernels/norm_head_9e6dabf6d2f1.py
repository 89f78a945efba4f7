"""norm_head

rms_norm: y = x / sqrt(mean(x^2) + eps) * (1 + w)
last_token: the last row of each sequence
linear: y = x w^T, cut into `splits` columns
Source: RMSNorm (arXiv:1910.07467), applied to the sum at the end: (x (1 + w)) W^T / rms(x); a product that reads each weight once
"""

import triton
import triton.language as tl


@triton.jit
def norm_head(
    rms_norm_x,  # input, fp32 [num_tokens, 256]
    last_token_cu_seqlens,  # input, i32 [num_seqs+1]
    rms_norm_w,  # weight, fp32 [256]
    linear_w,  # weight, fp32 [2048, 256]
    linear_y0,  # output, fp32 [num_seqs, 2048]
    num_tokens,
    num_seqs,
):
    BLOCK_K: tl.constexpr = 256
    BLOCK_N: tl.constexpr = 32
    EPS: tl.constexpr = 1e-06
    K: tl.constexpr = 256
    N: tl.constexpr = 2048
    STAGES: tl.constexpr = 1

    m = tl.program_id(1)
    row = tl.load(last_token_cu_seqlens + m + 1) - 1
    n = tl.arange(0, BLOCK_N)  # columns of this program, from its first
    first = tl.program_id(0) * BLOCK_N
    n_ok = first + n < N
    weight = linear_w + first.to(tl.int64) * K
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    square = tl.zeros([BLOCK_K], tl.float32)
    for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(rms_norm_x + row * K + k).to(tl.float32)
        square += a * a
        a *= 1.0 + tl.load(rms_norm_w + k).to(tl.float32)
        acc += tl.load(weight + n[:, None] * K + k[None, :], mask=n_ok[:, None], other=0.0).to(tl.float32) * a[None, :]
    out = tl.sum(acc, 1)
    scale = tl.rsqrt(tl.sum(square, 0) / K + EPS)
    out *= scale
    col = first + n
    ok = n_ok
    place = m * N + col
    tl.store(linear_y0 + place, out, mask=ok)
