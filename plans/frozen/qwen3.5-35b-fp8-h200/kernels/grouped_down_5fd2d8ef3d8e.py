"""grouped_down

grouped_down: y[t, j] = h[t, j] D^T, as one product for each expert
Source: one product for each expert, tiled one after the other (MegaBlocks, arXiv:2211.15841)

Grid: (block of columns, tile of pairs). One program computes COLUMNS columns, BLOCK_N at a time, for at most BLOCK_M
(token, expert) pairs of one expert, in the order of `order`.
K columns of x, N of the result, EXPERTS of this rank, TOP_K of a token; BLOCK_E: EXPERTS + 1 as a
power of two; `r` counts pairs in order, `n` columns, `k` the depth.
The weight is in FP8, with an fp32 factor for each BLOCK x BLOCK elements behind them (`scales`).
So is x, with a factor for each row and BLOCK columns (`x_scales`).
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
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Pairs `begin` to `end`, BLOCK_M at most, by some columns; those of other ranks give zero."""
    r = begin + tl.arange(0, BLOCK_M)
    ok_r = r < end
    pair = tl.load(order + r, mask=ok_r, other=0)
    row = (pair).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    is_local = expert < EXPERTS
    weight = w_ptr + (tl.where(is_local, expert, 0).to(tl.int64) * (N)) * K
    scales = (w_ptr + EXPERTS * (N * K)).to(tl.pointer_type(tl.float32))
    scales += tl.where(is_local, expert, 0) * (N // BLOCK * (K // BLOCK))
    x_scales = (x_ptr + num_rows * K).to(tl.pointer_type(tl.float32))
    k = tl.arange(0, BLOCK)
    x_0 = tl.load(
        x_ptr + row[:, None] * K + 0 * BLOCK + k[None, :], mask=ok_r[:, None], other=0.0
    )
    factor_0 = tl.load(x_scales + row * (K // BLOCK) + 0, mask=ok_r, other=0.0)
    x_1 = tl.load(
        x_ptr + row[:, None] * K + 1 * BLOCK + k[None, :], mask=ok_r[:, None], other=0.0
    )
    factor_1 = tl.load(x_scales + row * (K // BLOCK) + 1, mask=ok_r, other=0.0)
    x_2 = tl.load(
        x_ptr + row[:, None] * K + 2 * BLOCK + k[None, :], mask=ok_r[:, None], other=0.0
    )
    factor_2 = tl.load(x_scales + row * (K // BLOCK) + 2, mask=ok_r, other=0.0)
    x_3 = tl.load(
        x_ptr + row[:, None] * K + 3 * BLOCK + k[None, :], mask=ok_r[:, None], other=0.0
    )
    factor_3 = tl.load(x_scales + row * (K // BLOCK) + 3, mask=ok_r, other=0.0)
    for column in range(first, tl.minimum(first + COLUMNS, N), BLOCK_N):
        lines = weight + (column + n)[:, None] * K + k[None, :]
        at = scales + column // BLOCK * (K // BLOCK)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        w_tile = tl.load(lines + 0 * BLOCK)
        acc += tl.dot(x_0, tl.trans(w_tile)) * (factor_0 * tl.load(at + 0))[:, None]
        w_tile = tl.load(lines + 1 * BLOCK)
        acc += tl.dot(x_1, tl.trans(w_tile)) * (factor_1 * tl.load(at + 1))[:, None]
        w_tile = tl.load(lines + 2 * BLOCK)
        acc += tl.dot(x_2, tl.trans(w_tile)) * (factor_2 * tl.load(at + 2))[:, None]
        w_tile = tl.load(lines + 3 * BLOCK)
        acc += tl.dot(x_3, tl.trans(w_tile)) * (factor_3 * tl.load(at + 3))[:, None]
        acc = tl.where(is_local, acc, 0.0)
        tl.store(
            y_ptr + pair.to(tl.int64)[:, None] * N + column + n[None, :], acc, mask=ok_r[:, None]
        )


@triton.jit
def grouped_down(
    h,  # input, fp8[1x128]:fp32 [num_tokens, 4096]
    order,  # input, i32 [num_tokens, 8]
    bounds,  # input, i32 [257]
    w,  # weight, fp8[128x128]:fp32 [256, 2048, 512]
    y,  # output, bf16 [num_tokens, 16384]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK: tl.constexpr = 128
    BLOCK_E: tl.constexpr = 512
    BLOCK_K: tl.constexpr = 512
    BLOCK_M: tl.constexpr = 128
    BLOCK_N: tl.constexpr = 64
    COLUMNS: tl.constexpr = 1024
    EXPERTS: tl.constexpr = 256
    K: tl.constexpr = 512
    N: tl.constexpr = 2048
    PRECISION: tl.constexpr = 'tf32'
    TOP_K: tl.constexpr = 8

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
    if end - begin > BLOCK_M // 2:
        _tile(
            h,
            order,
            w,
            y,
            begin,
            end,
            expert,
            tl.program_id(0) * COLUMNS,
            num_tokens * TOP_K,
            N,
            K,
            TOP_K,
            EXPERTS,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            PRECISION,
            BLOCK,
            COLUMNS,
        )
    else:  # the last pairs of an expert, in a tile of half the height
        _tile(
            h,
            order,
            w,
            y,
            begin,
            end,
            expert,
            tl.program_id(0) * COLUMNS,
            num_tokens * TOP_K,
            N,
            K,
            TOP_K,
            EXPERTS,
            BLOCK_M // 2,
            BLOCK_N,
            BLOCK_K,
            PRECISION,
            BLOCK,
            COLUMNS,
        )
