"""Products of sorted (token, expert) pairs, programs that loop over tiles: see `experts.py`."""

import triton
import triton.language as tl


@triton.jit
def flat(
    x,
    order,
    bounds,
    w,
    y,
    counter,
    num_tokens,
    UP: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    BLOCK_E: tl.constexpr = 512
    WIDTH: tl.constexpr = BLOCK_W // 2 if UP else BLOCK_W
    LINES: tl.constexpr = 2 * N if UP else N
    COLUMNS: tl.constexpr = N // WIDTH
    num_pairs = num_tokens * TOP_K
    e = tl.arange(0, BLOCK_E)
    starts = tl.load(bounds + e, mask=e <= EXPERTS, other=0)
    ends = tl.load(bounds + e + 1, mask=e < EXPERTS, other=0)
    ends = tl.where(e == EXPERTS, num_pairs, ends)
    tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    last = tl.cumsum(tiles, 0)
    origin = starts - (last - tiles) * BLOCK_M
    total = tl.sum(tiles, 0) * COLUMNS
    n = tl.arange(0, BLOCK_W)
    line = tl.where(n < WIDTH, n, N - WIDTH + n) if UP else n
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=FLATTEN):
        slot = tile // COLUMNS
        first = tile % COLUMNS * WIDTH
        expert = tl.sum((last <= slot).to(tl.int32), 0)
        begin = tl.sum(tl.where(e == expert, origin, 0), 0) + slot * BLOCK_M
        end = tl.sum(tl.where(e == expert, ends, 0), 0)
        r = begin + tl.arange(0, BLOCK_M)
        ok = r < end
        pair = tl.load(order + r, mask=ok, other=0)
        row = pair // TOP_K if UP else pair
        weight = w + (expert.to(tl.int64) * LINES + first) * K
        acc = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x_tile = tl.load(x + row.to(tl.int64)[:, None] * K + k[None, :], mask=ok[:, None], other=0.0)
            w_tile = tl.load(weight + line[:, None] * K + k[None, :])
            acc = tl.dot(x_tile, tl.trans(w_tile), acc)
        c = first + tl.arange(0, WIDTH)
        target = y + pair.to(tl.int64)[:, None] * N + c[None, :]
        if UP:
            gate, up = tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, WIDTH]), 0, 2, 1))
            tl.store(target, (gate * tl.sigmoid(gate) * up).to(tl.bfloat16), mask=ok[:, None])
        else:
            tl.store(target, acc.to(tl.bfloat16), mask=ok[:, None])
