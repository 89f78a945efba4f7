"""linear

linear: y = x w^T, split into columns of the sizes `splits`
Source: a product that reads each weight once

Grid: (block of columns, block of sequences). One program computes BLOCK_M x BLOCK_N of the result,
on the tensor cores, BLOCK_K of the depth at a time.
The weight is in FP8, with an fp32 factor for each BLOCK x BLOCK elements behind them (`scales`).
K columns of x, N of the result; `m` counts sequences, `n` columns, `k` the depth, `row` rows of x.
SPLITS programs share a tile, each has SPLIT_K of the depth; the last of them to end adds up.
"""

import triton
import triton.language as tl


@triton.jit
def linear(
    x,  # input, bf16 [num_seqs, 4096]
    w,  # weight, fp8[128x128]:fp32 [2560, 4096]
    y0,  # output, bf16 [num_seqs, 2048]
    y1,  # output, bf16 [num_seqs, 256]
    y2,  # output, bf16 [num_seqs, 256]
    partial,  # scratch, fp32 [num_seqs, 10240]
    counters,  # scratch, i32 [num_seqs, 40]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK: tl.constexpr = 128
    BLOCK_K: tl.constexpr = 128
    BLOCK_M: tl.constexpr = 16
    BLOCK_N: tl.constexpr = 64
    K: tl.constexpr = 4096
    N: tl.constexpr = 2560
    PRECISION: tl.constexpr = 'tf32'
    SPLITS: tl.constexpr = 4
    SPLIT_K: tl.constexpr = 1024
    STAGES: tl.constexpr = 6
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may start
    tl.extra.cuda.gdc_wait()  # results of earlier kernels are visible

    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = m < num_seqs
    row = m
    n = tl.arange(0, BLOCK_N)  # columns of this program, from its first
    first = tl.program_id(0) * BLOCK_N
    n_ok = first + n < N
    weight = w + first.to(tl.int64) * K
    scales = (w + N * K).to(tl.pointer_type(tl.float32))
    scales += first // BLOCK * (K // BLOCK)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    begin = tl.program_id(2) * SPLIT_K
    for k0 in tl.range(begin, tl.minimum(begin + SPLIT_K, K), BLOCK_K, num_stages=STAGES):
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
        factor = tl.load(scales + k0 // BLOCK)
        w_tile = w_tile.to(tl.float16).to(tl.float32).to(tl.bfloat16)
        acc += tl.dot(x_tile, tl.trans(w_tile), input_precision=PRECISION) * factor
    ok = m_ok[:, None] & n_ok[None, :]
    offsets = m[:, None] * N + (first + n)[None, :]
    size = num_seqs * N
    tl.store(partial + tl.program_id(2) * size + offsets, acc, mask=ok)
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
    out = acc
    col = first + n
    ok = m_ok[:, None] & n_ok[None, :]
    offsets = m[:, None] * N + col[None, :]
    tl.store(
        y0 + m[:, None] * 2048 + (col - 0)[None, :],
        out,
        mask=ok & ((col >= 0) & (col < 2048))[None, :],
    )
    tl.store(
        y1 + m[:, None] * 256 + (col - 2048)[None, :],
        out,
        mask=ok & ((col >= 2048) & (col < 2304))[None, :],
    )
    tl.store(
        y2 + m[:, None] * 256 + (col - 2304)[None, :],
        out,
        mask=ok & ((col >= 2304) & (col < 2560))[None, :],
    )
