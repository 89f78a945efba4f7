"""add_norm

add: y = x + r
rms_norm: y = x / sqrt(mean(x^2) + eps) * (1 + w)
Source: RMSNorm (arXiv:1910.07467) of the residual stream


Grid: (token). One program normalises one token.
H hidden size, BLOCK_H the same as a power of two; `n` counts dimensions.
"""

import triton
import triton.language as tl


@triton.jit
def add_norm(
    add_x,  # input, bf16 [num_tokens, 4096]
    add_r,  # input, bf16 [num_tokens, 4096]
    rms_norm_w,  # weight, bf16 [4096]
    rms_norm_y,  # output, bf16 [num_tokens, 4096]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK_H: tl.constexpr = 4096
    EPS: tl.constexpr = 1e-06
    H: tl.constexpr = 4096

    t = tl.program_id(0)
    n = tl.arange(0, BLOCK_H)
    ok = n < H
    x = tl.load(add_x + t * H + n, mask=ok, other=0.0).to(tl.float32)
    x += tl.load(add_r + t * H + n, mask=ok, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 0) / H + EPS) * (
        1.0 + tl.load(rms_norm_w + n, mask=ok, other=0.0).to(tl.float32)
    )
    tl.store(rms_norm_y + t * H + n, x, mask=ok)
