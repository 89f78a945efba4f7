"""quantise

quantise: q = x / s rounded to e4m3, s = amax / 448 of each row and 128 columns; q has its elements,
then s
Source: activations in runs of 128 with a factor each (DeepSeek-V3, arXiv:2412.19437)

Grid: (row, block of columns). One program quantises BLOCK_K columns of a row.
K columns, `b` counts runs of BLOCK of them; E4M3_MAX is the largest number of e4m3,
MIN_AMAX the least that stands for the largest of a run.
"""

import triton
import triton.language as tl


@triton.jit
def quantise(
    x,  # input, bf16 [num_tokens, 128]
    q,  # output, fp8[1x128]:fp32 [num_tokens, 128]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK: tl.constexpr = 128
    BLOCK_K: tl.constexpr = 128
    E4M3_MAX: tl.constexpr = 448.0
    K: tl.constexpr = 128
    MIN_AMAX: tl.constexpr = 1e-30

    row = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1) * (BLOCK_K // BLOCK) + tl.arange(0, BLOCK_K // BLOCK)
    k = b[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    ok = b < K // BLOCK
    a = tl.load(x + row * K + k, mask=ok[:, None], other=0.0).to(tl.float32)
    scales = (q + num_tokens * K).to(tl.pointer_type(tl.float32))
    largest = tl.maximum(tl.max(tl.abs(a), -1), MIN_AMAX)
    most = tl.zeros_like(largest) + E4M3_MAX
    inverse = tl.expand_dims(tl.div_rn(most, largest), -1)
    tl.store(q + row * K + k, (a * inverse).to(tl.float8e4nv), mask=ok[:, None])
    tl.store(scales + row * (K // BLOCK) + b, tl.div_rn(largest, most), mask=ok)
