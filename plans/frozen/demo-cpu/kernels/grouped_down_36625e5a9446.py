"""grouped_down

grouped_down: y[t, j] = h[t, j] D^T, one product an expert
Source: a product a group of rows, the groups one after the other in tiles (MegaBlocks, arXiv:2211.15841)
"""

import triton
import triton.language as tl


@triton.jit
def _tile(
    x_ptr, order, w_ptr, y_ptr, begin, end, expert, first, N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows `begin` to `end` of the order, at most BLOCK_M, by some columns of their expert; other ranks' become zero."""
    r = begin + tl.arange(0, BLOCK_M)
    ok_r = r < end
    place = tl.load(order + r, mask=ok_r, other=0)
    row = (place).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    there = expert < EXPERTS
    weight = w_ptr + (tl.where(there, expert, 0).to(tl.int64) * (N) + first) * K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, tl.where(there, K, 0), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x_tile = tl.load(x_ptr + row[:, None] * K + k[None, :], mask=ok_r[:, None], other=0.0)
        acc = tl.dot(x_tile, tl.trans(tl.load(weight + n[:, None] * K + k[None, :])), acc, input_precision=PRECISION)
    ok = ok_r[:, None]
    tl.store(y_ptr + place.to(tl.int64)[:, None] * N + first + n[None, :], acc, mask=ok)


@triton.jit
def grouped_down(
    h,  # input, fp32 [num_tokens, 256]
    order,  # input, i32 [num_tokens, 2]
    bounds,  # input, i32 [9]
    w,  # weight, fp32 [8, 256, 128]
    y,  # output, fp32 [num_tokens, 512]
    num_tokens,
    num_seqs,
):
    BLOCK_E: tl.constexpr = 16
    BLOCK_K: tl.constexpr = 64
    BLOCK_M: tl.constexpr = 32
    BLOCK_N: tl.constexpr = 64
    EXPERTS: tl.constexpr = 8
    K: tl.constexpr = 128
    N: tl.constexpr = 256
    PRECISION: tl.constexpr = 'ieee'
    TOP_K: tl.constexpr = 2

    # Expert e has the tiles from bounds[e] // BLOCK_M + e on: its n rows fill n // BLOCK_M + 1 at most, and the next
    # expert begins no earlier. A tile that is nobody's returns.
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
            h, order, w, y, begin, end, expert, tl.program_id(0) * BLOCK_N, N, K, TOP_K, EXPERTS,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )
    else:  # the last rows of an expert in a tile of half the height
        _tile(
            h, order, w, y, begin, end, expert, tl.program_id(0) * BLOCK_N, N, K, TOP_K, EXPERTS,
            BLOCK_M // 2, BLOCK_N, BLOCK_K, PRECISION,
        )
