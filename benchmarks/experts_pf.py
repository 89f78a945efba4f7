"""The plan's kernel for experts, whose programs ask the L2 cache for lines of the weight ahead: see `experts.py`."""

import triton
import triton.language as tl


@triton.jit
def _prefetch(lines):
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [lines.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _tile(
    x_ptr,
    order,
    w_ptr,
    y_ptr,
    begin,
    end,
    expert,
    next_expert,
    first,
    UP: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
    WHOLE: tl.constexpr,
    DELTA: tl.constexpr,
):
    WIDTH: tl.constexpr = BLOCK_W // 2 if UP else BLOCK_W
    LINES: tl.constexpr = 2 * N if UP else N
    is_local = expert < EXPERTS
    weight = w_ptr + (tl.where(is_local, expert, 0).to(tl.int64) * LINES + first) * K
    n2 = tl.arange(0, BLOCK_W)
    line = tl.where(n2 < WIDTH, n2, N - WIDTH + n2) if UP else n2
    lines = weight + line * K
    if WHOLE > 0:
        if DELTA > 0:  # of the tile that is likely the next one on this multiprocessor
            next_w = w_ptr + (tl.where(next_expert < EXPERTS, next_expert, 0).to(tl.int64) * LINES + first) * K
            for j in tl.static_range(WHOLE):
                _prefetch(next_w + line * K + j * BLOCK_K)
    if WHOLE > 0 and DELTA == 0:
        for j in tl.static_range(WHOLE):
            _prefetch(lines + j * BLOCK_K)
    r = begin + tl.arange(0, BLOCK_M)
    ok_r = r < end
    pair = tl.load(order + r, mask=ok_r, other=0)
    row = (pair // TOP_K if UP else pair).to(tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
    for k0 in range(0, tl.where(is_local, K, 0), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        if AHEAD > 0:
            _prefetch(lines + tl.minimum(k0 + AHEAD * BLOCK_K, K - BLOCK_K))
        x_tile = tl.load(x_ptr + row[:, None] * K + k[None, :], mask=ok_r[:, None], other=0.0)
        w_tile = tl.load(weight + line[:, None] * K + k[None, :])
        acc = tl.dot(x_tile, tl.trans(w_tile), acc)
    ok = ok_r[:, None]
    c = first + tl.arange(0, WIDTH)
    target = y_ptr + pair.to(tl.int64)[:, None] * N + c[None, :]
    if UP:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, WIDTH]), 0, 2, 1))
        tl.store(target, gate * tl.sigmoid(gate) * up, mask=ok)
    else:
        tl.store(target, acc, mask=ok)


@triton.jit
def ahead(
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
    AHEAD: tl.constexpr,
    WHOLE: tl.constexpr,
    DELTA: tl.constexpr,
):
    BLOCK_E: tl.constexpr = 512
    WIDTH: tl.constexpr = BLOCK_W // 2 if UP else BLOCK_W
    e = tl.arange(0, BLOCK_E)
    starts = tl.load(bounds + e, mask=e <= EXPERTS, other=num_tokens * TOP_K)
    tile = tl.program_id(1)
    expert = tl.sum(((starts // BLOCK_M + e <= tile) & (e <= EXPERTS)).to(tl.int32), 0) - 1
    next_expert = expert
    if DELTA > 0:
        next_expert = tl.sum(((starts // BLOCK_M + e <= tile + DELTA) & (e <= EXPERTS)).to(tl.int32), 0) - 1
    begin = tl.load(bounds + expert)
    begin += (tile - begin // BLOCK_M - expert) * BLOCK_M
    end = tl.load(bounds + expert + 1, mask=expert < EXPERTS, other=num_tokens * TOP_K)
    if begin >= end:
        return
    first = tl.program_id(0) * WIDTH
    if end - begin > BLOCK_M // 2:
        _tile(x, order, w, y, begin, end, expert, next_expert, first, UP, N, K, TOP_K, EXPERTS, BLOCK_M, BLOCK_W, BLOCK_K, AHEAD, WHOLE, DELTA)
    else:
        _tile(x, order, w, y, begin, end, expert, next_expert, first, UP, N, K, TOP_K, EXPERTS, BLOCK_M // 2, BLOCK_W, BLOCK_K, AHEAD, WHOLE, DELTA)
