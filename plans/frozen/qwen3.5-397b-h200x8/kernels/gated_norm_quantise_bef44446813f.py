"""gated_norm_quantise

gated_norm: y = x / sqrt(mean(x^2) + eps) * w * silu(z), per head
quantise: q = x / s rounded to e4m3, s = amax / 448 of each row and 128 columns; q has its elements,
then s
Source: RMSNorm (arXiv:1910.07467) of each head, then the gate: the weight as it is stored

Grid: (token). One program normalises, gates and quantises all heads of a token.
HEADS value heads of D, BLOCK_H as a power of two; `h` counts heads, `d` dimensions of the head, `b` runs of BLOCK
columns with a factor each; E4M3_MAX is the largest number of e4m3, MIN_AMAX the least that stands
for the largest of a run.
"""

import triton
import triton.language as tl


@triton.jit
def gated_norm_quantise(
    gated_norm_x,  # input, bf16 [num_tokens, 1024]
    gated_norm_z,  # input, bf16 [num_tokens, 1024]
    gated_norm_w,  # weight, fp32 [128]
    quantise_q,  # output, fp8[1x128]:fp32 [num_tokens, 1024]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK: tl.constexpr = 128
    BLOCK_H: tl.constexpr = 8
    D: tl.constexpr = 128
    E4M3_MAX: tl.constexpr = 448.0
    EPS: tl.constexpr = 1e-06
    HEADS: tl.constexpr = 8
    MIN_AMAX: tl.constexpr = 1e-30

    t = tl.program_id(0).to(tl.int64)
    h, d = tl.arange(0, BLOCK_H), tl.arange(0, D)
    ok = (h < HEADS)[:, None]
    offsets = t * (HEADS * D) + h[:, None] * D + d[None, :]
    value = tl.load(gated_norm_x + offsets, mask=ok, other=0.0).to(tl.float32)
    gate = tl.load(gated_norm_z + offsets, mask=ok, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / D + EPS)
    value *= scale[:, None] * tl.load(gated_norm_w + d)[None, :] * gate * tl.sigmoid(gate)
    b = tl.arange(0, BLOCK_H * D // BLOCK)
    k = b[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    ok_b = b < HEADS * D // BLOCK
    a = tl.reshape(value.to(tl.bfloat16).to(tl.float32), (BLOCK_H * D // BLOCK, BLOCK))
    scales = (quantise_q + num_tokens * (HEADS * D)).to(tl.pointer_type(tl.float32))
    largest = tl.maximum(tl.max(tl.abs(a), -1), MIN_AMAX)
    most = tl.zeros_like(largest) + E4M3_MAX
    inverse = tl.expand_dims(tl.div_rn(most, largest), -1)
    tl.store(quantise_q + t * (HEADS * D) + k, (a * inverse).to(tl.float8e4nv), mask=ok_b[:, None])
    tl.store(scales + t * (HEADS * D // BLOCK) + b, tl.div_rn(largest, most), mask=ok_b)
