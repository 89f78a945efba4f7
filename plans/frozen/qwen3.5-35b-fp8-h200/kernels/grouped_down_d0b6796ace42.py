"""grouped_down

grouped_down: y[t, j] = h[t, j] D^T, as one product for each expert
Source: one product for each expert (MegaBlocks, arXiv:2211.15841); warps that load, and two groups that
multiply and store in turn (CUTLASS's ping-pong kernels for Hopper)

Grid: (multiprocessors). A program takes one tile after the other: WIDTH columns of the result for
at most 128 (token, expert) pairs of one expert, in the order of `order`. Four warps load, also
across the ends of tiles, four multiply the first 64 pairs of a tile, and four the other 64; the
second group begins later, so one of them stores while the other multiplies.
K columns of x, N of the result, EXPERTS of this rank, TOP_K of a token; BLOCK_E: EXPERTS + 1 as a
power of two; LINES of an expert's weight, 128 of a tile, GAP between its halves; STEPS of 128 of
the depth in a tile, of which STAGES are loaded ahead; `e` experts, `m` pairs of half a tile, `c`
columns, `k` the depth, `s` a stage.
Both are in FP8: a weight has an fp32 factor for each BLOCK x BLOCK elements behind them, x for each
row and BLOCK columns. Those of a step's rows are loaded with it; products go into a sum of their own,
which both factors multiply.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _find(tile, last, origin, ends, e, COLUMNS: gl.constexpr):
    """The expert of a tile, its pairs, and its block of columns; behind the last tile no pairs."""
    slot = tile // COLUMNS
    expert = gl.sum((last <= slot).to(gl.int32), 0)
    begin = gl.sum(gl.where(e == expert, origin, 0), 0) + slot * 128
    end = gl.sum(gl.where(e == expert, ends, 0), 0)
    return expert, begin, end, tile % COLUMNS


@gluon.jit
def _send(n, begin, end, column, steps, at, info, info_full, info_empty):
    """Tell both groups about the tile number n of this program."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    j = n % 2
    mbarrier.wait(info_empty.index(j), (n // 2 & 1) ^ 1)
    info.index(5 * j).store(gl.full([1], begin, gl.int32, ONE))
    info.index(5 * j + 1).store(gl.full([1], end, gl.int32, ONE))
    info.index(5 * j + 2).store(gl.full([1], column, gl.int32, ONE))
    info.index(5 * j + 3).store(gl.full([1], steps, gl.int32, ONE))
    info.index(5 * j + 4).store(gl.full([1], at, gl.int32, ONE))
    mbarrier.arrive(info_full.index(j), count=1)


@gluon.jit
def _receive(n, info, info_full, info_empty):
    """What `_send` told: a tile's pairs, block of columns, steps and factors."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    j = n % 2
    mbarrier.wait(info_full.index(j), n // 2 & 1)
    begin = gl.sum(info.index(5 * j).load(ONE), 0)
    end = gl.sum(info.index(5 * j + 1).load(ONE), 0)
    column = gl.sum(info.index(5 * j + 2).load(ONE), 0)
    steps = gl.sum(info.index(5 * j + 3).load(ONE), 0)
    at = gl.sum(info.index(5 * j + 4).load(ONE), 0)
    mbarrier.arrive(info_empty.index(j), count=1)
    return begin, end, column, steps, at


@gluon.jit
def _load(
    x0,
    x1,
    ok0,
    ok1,
    weight,
    factors,
    ok,
    a,
    b,
    f,
    full,
    empty,
    it,
    first,
    last,
    GAP: gl.constexpr,
    K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Steps `first` to `last` of a tile; `it` counts those of all tiles."""
    for step in range(first, last):
        s = it % STAGES
        mbarrier.wait(empty.index(s), (it // STAGES & 1) ^ 1)
        k = step * 128
        for j in gl.static_range(2):
            async_copy.async_copy_global_to_shared(b.index(2 * s + j), weight + k + j * GAP * K)
        async_copy.async_copy_global_to_shared(f.index(s), factors + step, mask=ok)
        async_copy.async_copy_global_to_shared(a.index(2 * s), x0 + k, mask=ok0)
        async_copy.async_copy_global_to_shared(a.index(2 * s + 1), x1 + k, mask=ok1)
        async_copy.mbarrier_arrive(full.index(s), increment_count=False)
        it += 1
    return it


@gluon.jit
def _produce(
    x,
    order,
    bounds,
    w,
    num_pairs,
    shared,
    BLOCK: gl.constexpr,
    BLOCK_E: gl.constexpr,
    EXPERTS: gl.constexpr,
    GAP: gl.constexpr,
    K: gl.constexpr,
    LINES: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    TOP_K: gl.constexpr,
    WIDTH: gl.constexpr,
):
    """Load the steps of all tiles of this program."""
    a, b, f, full, empty, info, info_full, info_empty = shared
    COLUMNS: gl.constexpr = N // WIDTH
    GROUPS: gl.constexpr = gl.BlockedLayout([BLOCK_E // 128], [32], [4], [0])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    e = gl.arange(0, BLOCK_E, layout=GROUPS)
    starts = gl.load(bounds + e, mask=e <= EXPERTS, other=0)
    ends = gl.load(bounds + e + 1, mask=e < EXPERTS, other=0)
    ends = gl.where(e == EXPERTS, num_pairs, ends)
    tiles = (ends - starts + 127) // 128
    # Blocks of rows up to the end of each expert, and the pair where block 0 would begin if all
    # blocks before were its own.
    last = gl.associative_scan(tiles, 0, _add)
    origin = starts - (last - tiles) * 128
    k = gl.arange(0, 128, layout=gl.SliceLayout(0, ROWS))
    m = gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
    both = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))  # halves of a tile
    f_steps = f._reinterpret(gl.float32, [STAGES, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    x_factors = (x + num_pairs * K).to(gl.pointer_type(gl.float32))
    it = gl.to_tensor(0)
    n = gl.to_tensor(0)
    tile = gl.program_id(0)
    expert, begin, end, column = _find(tile, last, origin, ends, e, COLUMNS)
    pair0 = gl.load(order + begin + m, mask=begin + m < end, other=0)
    pair1 = gl.load(order + begin + 64 + m, mask=begin + 64 + m < end, other=0)
    pairs = gl.load(order + begin + both, mask=begin + both < end, other=0)
    while begin < end:
        steps = gl.where(expert < EXPERTS, K // 128, 0)  # pairs of other ranks give zero
        line = expert * (LINES // BLOCK) + column * WIDTH // BLOCK
        _send(n, begin, end, column, steps, line * (K // BLOCK), info, info_full, info_empty)
        factors = x_factors + (pairs) * (K // BLOCK)
        row0 = (pair0).to(gl.int64)
        row1 = (pair1).to(gl.int64)
        x0 = x + row0[:, None] * K + k[None, :]
        x1 = x + row1[:, None] * K + k[None, :]
        ok0 = (begin + m < end)[:, None]
        ok1 = (begin + 64 + m < end)[:, None]
        weight = w + (expert.to(gl.int64) * LINES + column * WIDTH) * K
        weight = weight + m[:, None] * K + k[None, :]
        half = steps // 2
        ok = begin + both < end
        it = _load(
            x0, x1, ok0, ok1, weight, factors, ok, a, b, f_steps, full, empty, it, 0, half, GAP, K, STAGES
        )
        # In the middle of a tile: which is the next one, and which are its rows?
        tile += gl.num_programs(0)
        next_expert, next_begin, next_end, next_column = _find(
            tile, last, origin, ends, e, COLUMNS
        )
        pair0 = gl.load(order + next_begin + m, mask=next_begin + m < next_end, other=0)
        pair1 = gl.load(order + next_begin + 64 + m, mask=next_begin + 64 + m < next_end, other=0)
        pairs = gl.load(
            order + next_begin + both, mask=next_begin + both < next_end, other=0
        )
        it = _load(
            x0, x1, ok0, ok1, weight, factors, ok, a, b, f_steps, full, empty, it, half, steps, GAP, K, STAGES
        )
        expert, begin, end, column = next_expert, next_begin, next_end, next_column
        n += 1
    _send(n, 0, 0, 0, 0, 0, info, info_full, info_empty)


@gluon.jit
def _consume(
    order,
    w_factors,
    y,
    shared,
    HALF: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    WIDTH: gl.constexpr,
):
    """Pairs 64 HALF to 64 HALF + 63 of all tiles of this program."""
    a, b, f, full, empty, info, info_full, info_empty = shared
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    m = gl.arange(0, 64, layout=gl.SliceLayout(1, OUT))
    c = gl.arange(0, 128, layout=gl.SliceLayout(0, OUT))
    SMEM: gl.constexpr = gl.NVMMASharedLayout(128, 8)
    weights = b._reinterpret(gl.float8e4nv, [STAGES, 128, 128], SMEM)
    it = gl.to_tensor(0)
    n = gl.to_tensor(0)
    begin, end, column, steps, at = _receive(n, info, info_full, info_empty)
    if HALF == 1:
        mbarrier.wait(full.index(STAGES - 1), 0, pred=steps > 0)
    while begin < end:
        r = begin + 64 * HALF + m
        pair = gl.load(order + r, mask=r < end, other=0)
        if begin + 64 * HALF < end:
            acc = gl.zeros([64, 128], gl.float32, SUM)
            for step in range(steps):
                s = it % STAGES
                w_factor = gl.load(w_factors + at + step)
                mbarrier.wait(full.index(s), it // STAGES & 1)
                fence_async_shared()  # what threads copied is read past the caches of threads
                w_tile = weights.index(s).permute((1, 0))
                x_factor = f.index(2 * s + HALF).load(gl.SliceLayout(1, SUM))
                nothing = gl.zeros([64, 128], gl.float32, SUM)
                step_sum = warpgroup_mma(
                    a.index(2 * s + HALF), w_tile, nothing, use_acc=False, is_async=True
                )
                step_sum = warpgroup_mma_wait(0, deps=(step_sum,))
                mbarrier.arrive(empty.index(s), count=1)
                acc += step_sum * (x_factor[:, None] * w_factor)
                it += 1
            y_ptrs = y + pair.to(gl.int64)[:, None] * N + column * WIDTH + c[None, :]
            ok = (r < end)[:, None]
            gl.store(y_ptrs, gl.convert_layout(acc.to(gl.bfloat16), OUT), mask=ok)
        else:  # no pairs in this half of the tile
            for step in range(steps):
                s = it % STAGES
                mbarrier.wait(full.index(s), it // STAGES & 1)
                mbarrier.arrive(empty.index(s), count=1)
                it += 1
        n += 1
        begin, end, column, steps, at = _receive(n, info, info_full, info_empty)


@gluon.jit
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
    EXPERTS: tl.constexpr = 256
    GAP: tl.constexpr = 64
    K: tl.constexpr = 512
    LINES: tl.constexpr = 2048
    N: tl.constexpr = 2048
    STAGES: tl.constexpr = 4
    TOP_K: tl.constexpr = 8
    WIDTH: tl.constexpr = 128

    SMEM: tl.constexpr = gl.NVMMASharedLayout(128, 8)
    a = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, 64, 128], SMEM)
    b = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, 64, 128], SMEM)
    # Factors of a step's rows.
    f = gl.allocate_shared_memory(
        gl.float32, [2 * STAGES, 64], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    info = gl.allocate_shared_memory(gl.int32, [10, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    info_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    info_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=128)  # all threads that load
        mbarrier.init(empty.index(s), count=2)
    for j in gl.static_range(2):
        mbarrier.init(info_full.index(j), count=1)
        mbarrier.init(info_empty.index(j), count=2)
    shared = (a, b, f, full, empty, info, info_full, info_empty)
    num_pairs = num_tokens * TOP_K
    w_factors = (w + EXPERTS * LINES * K).to(gl.pointer_type(gl.float32))
    gl.warp_specialize(
        [
            (_consume, (order, w_factors, y, shared, 0, N, STAGES, WIDTH)),
            (_consume, (order, w_factors, y, shared, 1, N, STAGES, WIDTH)),
            (
                _produce,
                (
                    h,
                    order,
                    bounds,
                    w,
                    num_pairs,
                    shared,
                    BLOCK,
                    BLOCK_E,
                    EXPERTS,
                    GAP,
                    K,
                    LINES,
                    N,
                    STAGES,
                    TOP_K,
                    WIDTH,
                ),
            ),
        ],
        [4, 4],
        [208, 88],  # registers a thread; the first group gets what is left, as many as the second
    )
