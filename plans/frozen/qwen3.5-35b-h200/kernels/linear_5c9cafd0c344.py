"""linear

linear: y = x w^T, split into columns of the sizes `splits`
Source: a product that reads each weight once

Grid: (block of columns, block of tokens). One program computes BLOCK_M x BLOCK_N of the result,
on the tensor cores, BLOCK_K of the depth at a time.
K columns of x, N of the result; `m` counts tokens, `n` columns, `k` the depth, `row` rows of x.
"""

import triton
import triton.language as tl


@triton.jit
def linear(
    x,  # input, bf16 [num_tokens, 2048]
    w,  # weight, bf16 [9216, 2048]
    y0,  # output, bf16 [num_tokens, 8192]
    y1,  # output, bf16 [num_tokens, 512]
    y2,  # output, bf16 [num_tokens, 512]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK_K: tl.constexpr = 256
    BLOCK_M: tl.constexpr = 32
    BLOCK_N: tl.constexpr = 32
    K: tl.constexpr = 2048
    N: tl.constexpr = 9216
    PRECISION: tl.constexpr = 'tf32'
    STAGES: tl.constexpr = 4
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may start
    tl.extra.cuda.gdc_wait()  # results of earlier kernels are visible

    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = m < num_tokens
    row = m
    n = tl.arange(0, BLOCK_N)  # columns of this program, from its first
    first = tl.program_id(0) * BLOCK_N
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
        y0 + m[:, None] * 8192 + (col - 0)[None, :],
        out,
        mask=ok & ((col >= 0) & (col < 8192))[None, :],
    )
    tl.store(
        y1 + m[:, None] * 512 + (col - 8192)[None, :],
        out,
        mask=ok & ((col >= 8192) & (col < 8704))[None, :],
    )
    tl.store(
        y2 + m[:, None] * 512 + (col - 8704)[None, :],
        out,
        mask=ok & ((col >= 8704) & (col < 9216))[None, :],
    )
