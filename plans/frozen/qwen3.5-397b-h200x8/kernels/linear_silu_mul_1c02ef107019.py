"""linear_silu_mul

linear: y = x w^T, split into columns of the sizes `splits`
silu_mul: y = silu(x[:, :n]) * x[:, n:]
Source: SwiGLU (arXiv:2002.05202); a product that reads each weight once

Grid: (block of columns, block of tokens). One program computes BLOCK_M x BLOCK_N of the result,
on the tensor cores, BLOCK_K of the depth at a time.
The weight is in FP8, with an fp32 factor for each BLOCK x BLOCK elements behind them (`scales`).
So is x, with a factor for each row and BLOCK columns (`x_scales`).
K columns of x, N of the result; `m` counts tokens, `n` columns, `k` the depth, `row` rows of x.
GROUP_M: tiles of tokens that run side by side.
"""

import triton
import triton.language as tl


@triton.jit
def linear_silu_mul(
    linear_x,  # input, fp8[1x128]:fp32 [num_tokens, 4096]
    linear_w,  # weight, fp8[128x128]:fp32 [256, 4096]
    silu_mul_y,  # output, bf16 [num_tokens, 128]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK: tl.constexpr = 128
    BLOCK_K: tl.constexpr = 128
    BLOCK_M: tl.constexpr = 64
    BLOCK_N: tl.constexpr = 64
    GROUP_M: tl.constexpr = 16
    K: tl.constexpr = 4096
    N: tl.constexpr = 128
    PRECISION: tl.constexpr = 'tf32'
    STAGES: tl.constexpr = 4

    # Programs go down GROUP_M tiles of tokens, then to the next columns: what neighbours read stays
    # in the L2 cache.
    index = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    wide, high = tl.num_programs(0), tl.num_programs(1)
    above = index // (GROUP_M * wide) * GROUP_M
    here = tl.minimum(high - above, GROUP_M)
    tile_m, tile_n = above + index % here, index % (GROUP_M * wide) // here
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = m < num_tokens
    row = m
    n = tl.arange(0, BLOCK_N)  # columns of this program, from its first
    first = tile_n * BLOCK_N
    n_ok = first + n < N
    weight = linear_w + first.to(tl.int64) * K
    scales = (linear_w + 2 * N * K).to(tl.pointer_type(tl.float32))
    scales += first // BLOCK * (K // BLOCK)
    x_scales = (linear_x + num_tokens * K).to(tl.pointer_type(tl.float32))
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(
            linear_x + row[:, None] * K + k[None, :],
            mask=m_ok[:, None],
            other=0.0,
        )

        x_factor = tl.load(x_scales + row * (K // BLOCK) + k0 // BLOCK, mask=m_ok, other=0.0)
        x_tile = a
        w_tile = tl.load(
            weight + n[:, None] * K + k[None, :],
            mask=n_ok[:, None],
            other=0.0,
        )
        acc += tl.dot(x_tile, tl.trans(w_tile)) * (x_factor * tl.load(scales + k0 // BLOCK))[:, None]

        up_tile = tl.load(
            weight + N * K + n[:, None] * K + k[None, :],
            mask=n_ok[:, None],
            other=0.0,
        )
        acc_up += tl.dot(x_tile, tl.trans(up_tile)) * (x_factor * tl.load(scales + N // BLOCK * (K // BLOCK) + k0 // BLOCK))[:, None]
    out = acc
    up = acc_up
    out = out * tl.sigmoid(out) * up
    col = first + n
    ok = m_ok[:, None] & n_ok[None, :]
    offsets = m[:, None] * N + col[None, :]
    tl.store(silu_mul_y + offsets, out, mask=ok)
