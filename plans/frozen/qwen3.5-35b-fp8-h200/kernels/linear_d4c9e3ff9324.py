"""linear

linear: y = x w^T, split into columns of the sizes `splits`
Source: a product that reads each weight once

Grid: (block of columns, block of tokens). One program computes BLOCK_M x BLOCK_N of the result,
on the tensor cores, BLOCK_K of the depth at a time.
K columns of x, N of the result; `m` counts tokens, `n` columns, `k` the depth, `row` rows of x.
GROUP_M: tiles of tokens that run side by side.
"""

import triton
import triton.language as tl


@triton.jit
def linear(
    x,  # input, bf16 [num_tokens, 2048]
    w,  # weight, bf16 [64, 2048]
    y0,  # output, bf16 [num_tokens, 32]
    y1,  # output, bf16 [num_tokens, 32]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK_K: tl.constexpr = 128
    BLOCK_M: tl.constexpr = 64
    BLOCK_N: tl.constexpr = 32
    GROUP_M: tl.constexpr = 16
    K: tl.constexpr = 2048
    N: tl.constexpr = 64
    PRECISION: tl.constexpr = 'tf32'
    STAGES: tl.constexpr = 3

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
    weight = w + first.to(tl.int64) * K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(
            x + row[:, None] * K + k[None, :],
            mask=m_ok[:, None],
            other=0.0,
        )

        x_tile = a
        w_tile = tl.load(
            weight + n[:, None] * K + k[None, :],
            mask=n_ok[:, None],
            other=0.0,
        )
        acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision=PRECISION)
    out = acc
    col = first + n
    ok = m_ok[:, None] & n_ok[None, :]
    offsets = m[:, None] * N + col[None, :]
    tl.store(
        y0 + m[:, None] * 32 + (col - 0)[None, :],
        out,
        mask=ok & ((col >= 0) & (col < 32))[None, :],
    )
    tl.store(
        y1 + m[:, None] * 32 + (col - 32)[None, :],
        out,
        mask=ok & ((col >= 32) & (col < 64))[None, :],
    )
