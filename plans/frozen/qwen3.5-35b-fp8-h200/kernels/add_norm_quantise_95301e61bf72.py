"""add_norm_quantise

add: y = x + r
rms_norm: y = x / sqrt(mean(x^2) + eps) * (1 + w)
quantise: q = x / s rounded to e4m3, s = amax / 448 of each row and 128 columns; q has its elements,
then s
Source: RMSNorm (arXiv:1910.07467) of the residual stream


Grid: (token). One program normalises one token.
H hidden size, BLOCK_H the same as a power of two; `n` counts dimensions.
It leaves FP8 too: `b` counts runs of BLOCK dimensions with a factor each; E4M3_MAX is the largest
number of e4m3, MIN_AMAX the least that stands for the largest of a run.
"""

import triton
import triton.language as tl


@triton.jit
def add_norm_quantise(
    add_x,  # input, bf16 [num_tokens, 2048]
    add_r,  # input, bf16 [num_tokens, 2048]
    rms_norm_w,  # weight, bf16 [2048]
    add_y,  # output, bf16 [num_tokens, 2048]
    rms_norm_y,  # output, bf16 [num_tokens, 2048]
    quantise_q,  # output, fp8[1x128]:fp32 [num_tokens, 2048]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK: tl.constexpr = 128
    BLOCK_H: tl.constexpr = 2048
    E4M3_MAX: tl.constexpr = 448.0
    EPS: tl.constexpr = 1e-06
    H: tl.constexpr = 2048
    MIN_AMAX: tl.constexpr = 1e-30

    t = tl.program_id(0)
    n = tl.arange(0, BLOCK_H)
    ok = n < H
    x = tl.load(add_x + t * H + n, mask=ok, other=0.0).to(tl.float32)
    x += tl.load(add_r + t * H + n, mask=ok, other=0.0).to(tl.float32)
    tl.store(add_y + t * H + n, x, mask=ok)
    x *= tl.rsqrt(tl.sum(x * x, 0) / H + EPS) * (
        1.0 + tl.load(rms_norm_w + n, mask=ok, other=0.0).to(tl.float32)
    )
    tl.store(rms_norm_y + t * H + n, x, mask=ok)
    b = tl.arange(0, BLOCK_H // BLOCK)
    k = b[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    ok_b = b < H // BLOCK
    a = tl.reshape(x.to(tl.bfloat16).to(tl.float32), (BLOCK_H // BLOCK, BLOCK))
    scales = (quantise_q + num_tokens * H).to(tl.pointer_type(tl.float32))
    largest = tl.maximum(tl.max(tl.abs(a), -1), MIN_AMAX)
    most = tl.zeros_like(largest) + E4M3_MAX
    inverse = tl.expand_dims(tl.div_rn(most, largest), -1)
    tl.store(quantise_q + t * H + k, (a * inverse).to(tl.float8e4nv), mask=ok_b[:, None])
    tl.store(scales + t * (H // BLOCK) + b, tl.div_rn(largest, most), mask=ok_b)
