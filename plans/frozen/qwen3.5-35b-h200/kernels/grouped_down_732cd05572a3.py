"""grouped_down

grouped_down: y[t, j] = h[t, j] D^T, as one product for each expert
Source: one product for each expert, tiled one after the other (MegaBlocks, arXiv:2211.15841)

Grid: (block of columns, tile of pairs). One program computes BLOCK_N columns for at most BLOCK_M
(token, expert) pairs of one expert, in the order of `order`.
K columns of x, N of the result, EXPERTS of this rank, TOP_K of a token; BLOCK_E: EXPERTS + 1 as a
power of two; `r` counts pairs in order, `n` columns, `k` the depth.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(
    x_ptr,
    order,
    w_ptr,
    y_ptr,
    begin,
    end,
    expert,
    first,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Pairs `begin` to `end`, BLOCK_M at most, by some columns; those of other ranks give zero."""
    r = begin + tl.arange(0, BLOCK_M)
    ok_r = r < end
    pair = tl.load(order + r, mask=ok_r, other=0)
    row = (pair).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    is_local = expert < EXPERTS
    weight = w_ptr + (tl.where(is_local, expert, 0).to(tl.int64) * (N) + first) * K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, tl.where(is_local, K, 0), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x_tile = tl.load(x_ptr + row[:, None] * K + k[None, :], mask=ok_r[:, None], other=0.0)
        w_tile = tl.load(weight + n[:, None] * K + k[None, :])
        acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision=PRECISION)
    ok = ok_r[:, None]
    tl.store(y_ptr + pair.to(tl.int64)[:, None] * N + first + n[None, :], acc, mask=ok)


@triton.jit
def grouped_down(
    h,  # input, bf16 [num_tokens, 4096]
    order,  # input, i32 [num_tokens, 8]
    bounds,  # input, i32 [257]
    w,  # weight, bf16 [256, 2048, 512]
    y,  # output, bf16 [num_tokens, 16384]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK_E: tl.constexpr = 512
    BLOCK_K: tl.constexpr = 128
    BLOCK_M: tl.constexpr = 16
    BLOCK_N: tl.constexpr = 64
    EXPERTS: tl.constexpr = 256
    K: tl.constexpr = 512
    N: tl.constexpr = 2048
    PRECISION: tl.constexpr = 'tf32'
    TOP_K: tl.constexpr = 8
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may start
    tl.extra.cuda.gdc_wait()  # results of earlier kernels are visible

    # The tiles of expert e begin at bounds[e] // BLOCK_M + e: its n pairs fill n // BLOCK_M + 1 at
    # most, so the next expert begins no earlier than they end. A tile without pairs returns.
    e = tl.arange(0, BLOCK_E)
    starts = tl.load(bounds + e, mask=e <= EXPERTS, other=num_tokens * TOP_K)
    tile = tl.program_id(1)
    expert = tl.sum(((starts // BLOCK_M + e <= tile) & (e <= EXPERTS)).to(tl.int32), 0) - 1
    begin = tl.load(bounds + expert)
    begin += (tile - begin // BLOCK_M - expert) * BLOCK_M
    end = tl.load(bounds + expert + 1, mask=expert < EXPERTS, other=num_tokens * TOP_K)
    if begin >= end:
        return
    _tile(
        h,
        order,
        w,
        y,
        begin,
        end,
        expert,
        tl.program_id(0) * BLOCK_N,
        N,
        K,
        TOP_K,
        EXPERTS,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        PRECISION,
    )
