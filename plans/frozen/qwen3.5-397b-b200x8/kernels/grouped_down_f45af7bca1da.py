"""grouped_down

grouped_down: y[t, j] = h[t, j] D^T, as one product for each expert
Source: one product for each expert, tiled one after the other (MegaBlocks, arXiv:2211.15841)

Grid: (block of columns, tile of pairs). One program computes BLOCK_N columns for at most BLOCK_M
(token, expert) pairs of one expert, in the order of `order`.
K columns of x, N of the result, EXPERTS of this rank, TOP_K of a token; BLOCK_E: EXPERTS + 1 as a
power of two; `r` counts pairs in order, `n` columns, `k` the depth.
The weight is in NVFP4; tiles of it are made plain in registers.
"""

import triton
import triton.language as tl


@triton.jit
def _elements(words, J: tl.constexpr):
    """Two elements of each word, of the groups J and J + 4, times 2^-14."""
    bits = words << (12 - 4 * J)
    bits = (bits & -2147450880) | ((bits >> 3) & 234884608)  # signs, and three bits below them
    low = bits.to(tl.int16).to(tl.float16, bitcast=True)
    high = (bits >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _scale(word, J: tl.constexpr):
    """The scale in byte J of a word, times 2^-8."""
    if J == 0:
        bits = word << 7
    else:
        bits = word >> (8 * J - 7)
    return (bits & 32640).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _matrix_tile(
    weight,
    scales,
    row,
    ok_row,
    k0,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Elements times scales [BLOCK_N, BLOCK_K], which bfloat16 holds exactly."""
    run = k0 // 128 + tl.arange(0, BLOCK_K // 128)
    i = tl.arange(0, 16)
    ok = ok_row[:, None]
    at = row[:, None] * (K // 128) + run[None, :]
    words = tl.load(
        weight + (at * 16)[:, :, None] + i[None, None, :], mask=ok[:, :, None], other=0
    )
    low_scales = tl.load(scales + at * 2, mask=ok, other=0)
    high_scales = tl.load(scales + at * 2 + 1, mask=ok, other=0)
    pairs = ()
    for j in tl.static_range(4):
        low, high = _elements(words, j)
        low *= (_scale(low_scales, j) * UNIT)[:, :, None]
        high *= (_scale(high_scales, j) * UNIT)[:, :, None]
        pairs = pairs + (tl.join(low.to(tl.bfloat16), high.to(tl.bfloat16)),)
    groups = tl.join(tl.join(pairs[0], pairs[2]), tl.join(pairs[1], pairs[3]))
    return tl.reshape(tl.permute(groups, (0, 1, 3, 4, 5, 2)), (BLOCK_N, BLOCK_K))


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
    n = first + tl.arange(0, BLOCK_N)
    is_local = expert < EXPERTS
    ok_n = (n < N) & is_local
    held = tl.where(is_local, expert, 0).to(tl.int64)
    behind = w_ptr + EXPERTS * (N * (K // 8))
    weight = w_ptr + held * (N * (K // 8))
    factors = behind.to(tl.pointer_type(tl.float32)) + held * (N)
    scales = behind + EXPERTS * (N) + held * (N * (K // 64))
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, tl.where(is_local, K, 0), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        ok_x = ok_r[:, None]
        x_tile = tl.load(x_ptr + row[:, None] * K + k[None, :], mask=ok_x, other=0.0)
        w_tile = _matrix_tile(weight, scales, n, ok_n, k0, K, BLOCK_N, BLOCK_K, 4194304.0)
        acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision=PRECISION)
    acc *= tl.load(factors + n, mask=ok_n, other=0.0)[None, :]
    ok = ok_r[:, None] & (n < N)[None, :]
    tl.store(y_ptr + pair.to(tl.int64)[:, None] * N + n[None, :], acc, mask=ok)


@triton.jit
def grouped_down(
    h,  # input, bf16 [num_tokens, 1280]
    order,  # input, i32 [num_tokens, 10]
    bounds,  # input, i32 [513]
    w,  # weight, fp4[1x16]:fp8:fp32 [512, 4096, 128]
    y,  # output, bf16 [num_tokens, 40960]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK_E: tl.constexpr = 1024
    BLOCK_K: tl.constexpr = 128
    BLOCK_M: tl.constexpr = 128
    BLOCK_N: tl.constexpr = 64
    EXPERTS: tl.constexpr = 512
    K: tl.constexpr = 128
    N: tl.constexpr = 4096
    PRECISION: tl.constexpr = 'tf32'
    TOP_K: tl.constexpr = 10

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
    else:  # the last pairs of an expert, in a tile of half the height
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
            BLOCK_M // 2,
            BLOCK_N,
            BLOCK_K,
            PRECISION,
        )
