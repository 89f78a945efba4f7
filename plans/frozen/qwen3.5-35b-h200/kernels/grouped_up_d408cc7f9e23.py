"""grouped_up

grouped_up: experts_up, one product an expert
Source: a product a group of rows, the groups one after the other in tiles (MegaBlocks, arXiv:2211.15841)
"""

import triton
import triton.language as tl


@triton.jit
def grouped_up(
    x,  # input, bf16 [num_tokens, 2048]
    order,  # input, i32 [num_tokens, 8]
    bounds,  # input, i32 [257]
    w,  # weight, bf16 [256, 1024, 2048]
    y,  # output, bf16 [num_tokens, 4096]
    num_tokens,
    num_seqs,
):
    BLOCK_E: tl.constexpr = 512
    BLOCK_K: tl.constexpr = 64
    BLOCK_M: tl.constexpr = 128
    BLOCK_N: tl.constexpr = 128
    EXPERTS: tl.constexpr = 256
    K: tl.constexpr = 2048
    N: tl.constexpr = 512
    PRECISION: tl.constexpr = 'tf32'
    TOP_K: tl.constexpr = 8

    # Which expert's tile is this? Experts before it take ceil(rows / BLOCK_M) tiles each; the last group is other ranks'.
    e = tl.arange(0, BLOCK_E)
    size = num_tokens * TOP_K
    starts = tl.load(bounds + e, mask=e <= EXPERTS, other=0)
    ends = tl.where(e == EXPERTS, size, tl.load(bounds + e + 1, mask=e < EXPERTS, other=0))
    tiles = tl.where(e <= EXPERTS, (ends - starts + BLOCK_M - 1) // BLOCK_M, 0)
    upto = tl.cumsum(tiles, 0)
    tile = tl.program_id(1)
    expert = tl.sum((upto <= tile).to(tl.int32), 0)
    if expert > EXPERTS:
        return
    this = e == expert
    begin = tl.sum(tl.where(this, starts, 0), 0) + (tile - tl.sum(tl.where(this, upto - tiles, 0), 0)) * BLOCK_M
    end = tl.sum(tl.where(this, ends, 0), 0)
    r = begin + tl.arange(0, BLOCK_M)
    ok_r = r < end
    place = tl.load(order + r, mask=ok_r, other=0)
    n = tl.arange(0, BLOCK_N)
    first = tl.program_id(0) * BLOCK_N
    ok_n = first + n < N
    there = expert < EXPERTS
    weight = w + (tl.where(there, expert, 0).to(tl.int64) * (2 * N) + first) * K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    row = place // TOP_K
    for k0 in range(0, tl.where(there, K, 0), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        mask = ok_n[:, None] & (k < K)[None, :]
        x_tile = tl.load(x + row.to(tl.int64)[:, None] * K + k[None, :], mask=ok_r[:, None] & (k < K)[None, :], other=0.0)
        tile_w = tl.load(weight + n[:, None] * K + k[None, :], mask=mask, other=0.0)
        acc = tl.dot(x_tile, tl.trans(tile_w), acc, input_precision=PRECISION)
        tile_up = tl.load(weight + N * K + n[:, None] * K + k[None, :], mask=mask, other=0.0)
        acc_up = tl.dot(x_tile, tl.trans(tile_up), acc_up, input_precision=PRECISION)
    acc = acc * tl.sigmoid(acc) * acc_up
    tl.store(y + place.to(tl.int64)[:, None] * N + first + n[None, :], acc, mask=ok_r[:, None] & ok_n[None, :])
