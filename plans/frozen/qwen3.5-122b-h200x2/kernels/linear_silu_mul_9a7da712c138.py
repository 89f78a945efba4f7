"""linear_silu_mul

linear: y = x w^T, split into columns of the sizes `splits`
silu_mul: y = silu(x[:, :n]) * x[:, n:]
Source: SwiGLU (arXiv:2002.05202); a product that reads each weight once

Grid: (block of columns, block of tokens). One program computes BLOCK_M x BLOCK_N of the result,
on the tensor cores, BLOCK_K of the depth at a time.
K columns of x, N of the result; `m` counts tokens, `n` columns, `k` the depth, `row` rows of x.
SPLITS programs share a tile, each has SPLIT_K of the depth; the last of them to end adds up.
"""

import triton
import triton.language as tl


@triton.jit
def linear_silu_mul(
    linear_x,  # input, bf16 [num_tokens, 3072]
    linear_w,  # weight, bf16 [1024, 3072]
    silu_mul_y,  # output, bf16 [num_tokens, 512]
    partial,  # scratch, fp32 [num_tokens, 2048]
    counters,  # scratch, i32 [num_tokens, 16]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK_K: tl.constexpr = 128
    BLOCK_M: tl.constexpr = 64
    BLOCK_N: tl.constexpr = 32
    K: tl.constexpr = 3072
    N: tl.constexpr = 512
    PRECISION: tl.constexpr = 'tf32'
    SPLITS: tl.constexpr = 2
    SPLIT_K: tl.constexpr = 1536
    STAGES: tl.constexpr = 4
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may start
    tl.extra.cuda.gdc_wait()  # results of earlier kernels are visible

    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = m < num_tokens
    row = m
    n = tl.arange(0, BLOCK_N)  # columns of this program, from its first
    first = tl.program_id(0) * BLOCK_N
    n_ok = first + n < N
    weight = linear_w + first.to(tl.int64) * K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    begin = tl.program_id(2) * SPLIT_K
    for k0 in tl.range(begin, tl.minimum(begin + SPLIT_K, K), BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(
            linear_x + row[:, None] * K + k[None, :],
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

        up_tile = tl.load(
            weight + N * K + n[:, None] * K + k[None, :],
            mask=n_ok[:, None],
            other=0.0,
        )
        acc_up = tl.dot(x_tile, tl.trans(up_tile), acc_up, input_precision=PRECISION)
    ok = m_ok[:, None] & n_ok[None, :]
    offsets = m[:, None] * N + (first + n)[None, :]
    size = num_tokens * N
    tl.store(partial + tl.program_id(2) * size + offsets, acc, mask=ok)
    tl.store(partial + (SPLITS + tl.program_id(2)) * size + offsets, acc_up, mask=ok)
    tl.debug_barrier()
    counter = counters + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    if tl.atomic_add(counter, 1, sem="acq_rel") < SPLITS - 1:
        return
    tl.store(counter, 0)  # for the next launch
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for part in tl.static_range(SPLITS):
        acc += tl.load(
            partial + part * size + offsets, mask=ok, other=0.0, cache_modifier=".cg"
        )
    acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for part in tl.static_range(SPLITS):
        acc_up += tl.load(
            partial + SPLITS * size + part * size + offsets, mask=ok, other=0.0, cache_modifier=".cg"
        )
    out = acc
    up = acc_up
    out = out * tl.sigmoid(out) * up
    col = first + n
    ok = m_ok[:, None] & n_ok[None, :]
    offsets = m[:, None] * N + col[None, :]
    tl.store(silu_mul_y + offsets, out, mask=ok)
