"""Products of sorted (token, expert) pairs on Hopper, warp-specialised: see `experts.py`.

Programs stay on their multiprocessor and take one tile after the other. Four warps load, ahead of
the tiles: rows of x one by one, a block of the weight by 16 bytes a thread, or by the copy engine
(COPY_ENGINE). Two groups of four warps multiply 64 rows each; one stores while the other multiplies.
Tile: 2 x 64 pairs of an expert, 256 lines of its weight. STEPS of 64 of the depth; `s` a stage.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _find(tile, last, origin, ends, e, COLUMNS: gl.constexpr, BLOCK_M: gl.constexpr):
    """The expert of a tile, its pairs, and its block of columns; behind the last no pairs."""
    slot = tile // COLUMNS
    expert = gl.sum((last <= slot).to(gl.int32), 0)
    begin = gl.sum(gl.where(e == expert, origin, 0), 0) + slot * BLOCK_M
    end = gl.sum(gl.where(e == expert, ends, 0), 0)
    return expert, begin, end, tile % COLUMNS


@gluon.jit
def _send(n, begin, end, column, steps, info, info_full, info_empty):
    """Tell both groups about tile number n of this program."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    j = n % 2
    mbarrier.wait(info_empty.index(j), ((n // 2) & 1) ^ 1)
    info.index(4 * j).store(gl.full([1], begin, gl.int32, ONE))
    info.index(4 * j + 1).store(gl.full([1], end, gl.int32, ONE))
    info.index(4 * j + 2).store(gl.full([1], column, gl.int32, ONE))
    info.index(4 * j + 3).store(gl.full([1], steps, gl.int32, ONE))
    mbarrier.arrive(info_full.index(j), count=1)


@gluon.jit
def _receive(n, info, info_full, info_empty):
    """What `_send` told."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    j = n % 2
    mbarrier.wait(info_full.index(j), (n // 2) & 1)
    begin = gl.sum(info.index(4 * j).load(ONE), 0)
    end = gl.sum(info.index(4 * j + 1).load(ONE), 0)
    column = gl.sum(info.index(4 * j + 2).load(ONE), 0)
    steps = gl.sum(info.index(4 * j + 3).load(ONE), 0)
    mbarrier.arrive(info_empty.index(j), count=1)
    return begin, end, column, steps


@gluon.jit
def _prefetch(lines):
    """Bring lines of 128 bytes into the L2 cache."""
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [lines.to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _load(
    x0,
    x1,
    ok0,
    ok1,
    w,
    w_line,
    lines,
    a,
    b,
    full,
    empty,
    it,
    first,
    last,
    steps,
    AHEAD: gl.constexpr,
    STAGES: gl.constexpr,
    COPY_ENGINE: gl.constexpr,
    GAP: gl.constexpr,
    K: gl.constexpr,
):
    """Steps `first` to `last` of a tile; `it` counts those of all tiles."""
    for step in range(first, last):
        s = it % STAGES
        mbarrier.wait(empty.index(s), ((it // STAGES) & 1) ^ 1)
        k = step * 64
        if AHEAD > 0:
            if step + AHEAD < steps:
                _prefetch(lines + (k + AHEAD * 64))
        if COPY_ENGINE:
            SMEM: gl.constexpr = gl.NVMMASharedLayout(128, 16)
            halves = b._reinterpret(gl.bfloat16, [2 * STAGES, 128, 64], SMEM)
            mbarrier.expect(full.index(s), 256 * 64 * 2)
            tma.async_copy_global_to_shared(w, [w_line, k], full.index(s), halves.index(2 * s))
            tma.async_copy_global_to_shared(
                w, [w_line + GAP, k], full.index(s), halves.index(2 * s + 1)
            )
        else:
            SMEM64: gl.constexpr = gl.NVMMASharedLayout(128, 16)
            pieces = b._reinterpret(gl.bfloat16, [4 * STAGES, 64, 64], SMEM64)
            block = w_line + k
            for j in gl.static_range(4):
                async_copy.async_copy_global_to_shared(
                    pieces.index(4 * s + j), block + (j // 2 * GAP + j % 2 * 64) * K
                )
        async_copy.async_copy_global_to_shared(a.index(2 * s), x0 + k, mask=ok0)
        async_copy.async_copy_global_to_shared(a.index(2 * s + 1), x1 + k, mask=ok1)
        async_copy.mbarrier_arrive(full.index(s), increment_count=False)
        it += 1
    return it


@gluon.jit
def _taken(expert, DIAG: gl.constexpr):
    if DIAG & 1:  # weights of four experts, which stay in the L2 cache
        expert = expert % 4
    return expert


@gluon.jit
def _produce(
    x,
    order,
    bounds,
    w,
    counter,
    num_pairs,
    a,
    b,
    full,
    empty,
    info,
    info_full,
    info_empty,
    UP: gl.constexpr,
    EXPERTS: gl.constexpr,
    TOP_K: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    STAGES: gl.constexpr,
    COPY_ENGINE: gl.constexpr,
    DYNAMIC: gl.constexpr,
    AHEAD: gl.constexpr,
    DIAG: gl.constexpr,
):
    BLOCK_M: gl.constexpr = 128
    BLOCK_E: gl.constexpr = 512
    WIDTH: gl.constexpr = 128 if UP else 256  # columns of the result
    COLUMNS: gl.constexpr = N // WIDTH
    LINES: gl.constexpr = 2 * N if UP else N
    GAP: gl.constexpr = N if UP else 128  # lines between the halves of a block of the weight
    GROUPS: gl.constexpr = gl.BlockedLayout([BLOCK_E // 128], [32], [4], [0])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    # The groups of pairs: the tiles before the end of each, and where its first tile would begin
    # if it were tile 0.
    e = gl.arange(0, BLOCK_E, layout=GROUPS)
    starts = gl.load(bounds + e, mask=e <= EXPERTS, other=0)
    ends = gl.load(bounds + e + 1, mask=e < EXPERTS, other=0)
    ends = gl.where(e == EXPERTS, num_pairs, ends)
    tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    last = gl.associative_scan(tiles, 0, _add)
    origin = starts - (last - tiles) * BLOCK_M
    total = gl.sum(tiles, 0) * COLUMNS

    k = gl.arange(0, 64, layout=gl.SliceLayout(0, ROWS))
    m = gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
    LINE: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    n2 = gl.arange(0, 256, layout=LINE)
    offsets = gl.where(n2 < 128, n2, GAP - 128 + n2) * K
    it = gl.to_tensor(0)
    n = gl.to_tensor(0)
    tile = gl.program_id(0)
    expert, begin, end, column = _find(tile, last, origin, ends, e, COLUMNS, BLOCK_M)
    pair0 = gl.load(order + begin + m, mask=begin + m < end, other=0)
    pair1 = gl.load(order + begin + 64 + m, mask=begin + 64 + m < end, other=0)
    while begin < end:
        steps = gl.where(expert < EXPERTS, K // 64, 0)
        _send(n, begin, end, column, steps, info, info_full, info_empty)
        if UP:
            row0 = pair0 // TOP_K
            row1 = pair1 // TOP_K
        else:
            row0 = pair0
            row1 = pair1
        if DIAG & 2:  # the same rows again and again
            row0 = m
            row1 = m
        x0 = x + row0.to(gl.int64)[:, None] * K + k[None, :]
        x1 = x + row1.to(gl.int64)[:, None] * K + k[None, :]
        ok0 = (begin + m < end)[:, None]
        ok1 = (begin + 64 + m < end)[:, None]
        weight = w + (_taken(expert, DIAG).to(gl.int64) * LINES + column * WIDTH) * K
        w_line = weight + m[:, None] * K + k[None, :]
        quarter = steps // 4
        lines = weight + offsets
        it = _load(
            x0, x1, ok0, ok1, w, w_line, lines, a, b, full, empty, it, 0, quarter, steps, AHEAD, STAGES, COPY_ENGINE, GAP, K
        )
        if DYNAMIC:
            asked = gl.atomic_add(counter, 1)
            if asked == total - 1:  # nobody asks after this: as many ask as there are tiles
                gl.store(counter, 0)
            tile = asked + gl.num_programs(0)
        else:
            tile += gl.num_programs(0)
        it = _load(
            x0, x1, ok0, ok1, w, w_line, lines, a, b, full, empty, it, quarter, 2 * quarter, steps, AHEAD, STAGES, COPY_ENGINE, GAP, K
        )
        next_expert, next_begin, next_end, next_column = _find(
            tile, last, origin, ends, e, COLUMNS, BLOCK_M
        )
        pair0 = gl.load(order + next_begin + m, mask=next_begin + m < next_end, other=0)
        pair1 = gl.load(order + next_begin + 64 + m, mask=next_begin + 64 + m < next_end, other=0)
        if AHEAD > 0:
            if (next_begin < next_end) & (next_expert < EXPERTS):
                start = w + (_taken(next_expert, DIAG).to(gl.int64) * LINES + next_column * WIDTH) * K
                for j in range(AHEAD):
                    _prefetch(start + offsets + j * 64)
        it = _load(
            x0, x1, ok0, ok1, w, w_line, lines, a, b, full, empty, it, 2 * quarter, steps, steps, AHEAD, STAGES, COPY_ENGINE, GAP, K
        )
        expert, begin, end, column = next_expert, next_begin, next_end, next_column
        n += 1
    _send(n, 0, 0, 0, 0, info, info_full, info_empty)


@gluon.jit
def _consume(
    order,
    y,
    a,
    b,
    full,
    empty,
    info,
    info_full,
    info_empty,
    HALF: gl.constexpr,
    UP: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    SKEW: gl.constexpr,
    DIAG: gl.constexpr,
    CACHE: gl.constexpr,
):
    """Rows 64 HALF to 64 HALF + 63 of each tile."""
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    WIDTH: gl.constexpr = 128 if UP else 256
    m = gl.arange(0, 64, layout=gl.SliceLayout(1, OUT))
    c = gl.arange(0, 128, layout=gl.SliceLayout(0, OUT))
    it = gl.to_tensor(0)
    n = gl.to_tensor(0)
    begin, end, column, steps = _receive(n, info, info_full, info_empty)
    if SKEW and HALF == 1:  # begin late: so one group stores while the other multiplies
        mbarrier.wait(full.index(STAGES - 1), 0, pred=steps > 0)
    while begin < end:
        r = begin + 64 * HALF + m
        pair = gl.load(order + r, mask=r < end, other=0)
        if begin + 64 * HALF < end:
            acc = gl.zeros([64, 256], gl.float32, SUM)
            for step in range(steps):
                s = it % STAGES
                mbarrier.wait(full.index(s), (it // STAGES) & 1)
                fence_async_shared()
                acc = warpgroup_mma(
                    a.index(2 * s + HALF), b.index(s).permute((1, 0)), acc, is_async=True
                )
                acc = warpgroup_mma_wait(1, deps=(acc,))
                mbarrier.arrive(empty.index((it + STAGES - 1) % STAGES), count=1, pred=step > 0)
                it += 1
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index((it + STAGES - 1) % STAGES), count=1, pred=steps > 0)
            left, right = gl.split(gl.permute(gl.reshape(acc, [64, 2, 128]), (0, 2, 1)))
            target = y + pair.to(gl.int64)[:, None] * N + column * WIDTH + c[None, :]
            ok = (r < end)[:, None]
            if DIAG & 4:  # what is stored is next to nothing
                ok = (r == 0)[:, None]
            if UP:
                out = left / (1.0 + gl.exp(-left)) * right
                gl.store(target, gl.convert_layout(out.to(gl.bfloat16), OUT), mask=ok, cache_modifier=CACHE)
            else:
                gl.store(target, gl.convert_layout(left.to(gl.bfloat16), OUT), mask=ok, cache_modifier=CACHE)
                gl.store(target + 128, gl.convert_layout(right.to(gl.bfloat16), OUT), mask=ok, cache_modifier=CACHE)
        else:
            for step in range(steps):
                s = it % STAGES
                mbarrier.wait(full.index(s), (it // STAGES) & 1)
                mbarrier.arrive(empty.index(s), count=1)
                it += 1
        n += 1
        begin, end, column, steps = _receive(n, info, info_full, info_empty)


@gluon.jit
def grouped(
    x,
    order,
    bounds,
    w,
    y,
    counter,
    num_tokens,
    UP: gl.constexpr,
    EXPERTS: gl.constexpr,
    TOP_K: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    STAGES: gl.constexpr,
    COPY_ENGINE: gl.constexpr,
    DYNAMIC: gl.constexpr,
    SKEW: gl.constexpr,
    AHEAD: gl.constexpr,
    DIAG: gl.constexpr,
    CACHE: gl.constexpr,
    R: gl.constexpr,
    P: gl.constexpr,
):
    SMEM: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    a = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, 64, 64], SMEM)
    b = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 256, 64], SMEM)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    info = gl.allocate_shared_memory(gl.int32, [8, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    info_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    info_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=129 if COPY_ENGINE else 128)
        mbarrier.init(empty.index(s), count=2)
    for j in gl.static_range(2):
        mbarrier.init(info_full.index(j), count=1)
        mbarrier.init(info_empty.index(j), count=2)
    num_pairs = num_tokens * TOP_K
    gl.warp_specialize(
        [
            (
                _consume,
                (order, y, a, b, full, empty, info, info_full, info_empty, 0, UP, N, STAGES, SKEW, DIAG, CACHE),
            ),
            (
                _consume,
                (order, y, a, b, full, empty, info, info_full, info_empty, 1, UP, N, STAGES, SKEW, DIAG, CACHE),
            ),
            (
                _produce,
                (
                    x,
                    order,
                    bounds,
                    w,
                    counter,
                    num_pairs,
                    a,
                    b,
                    full,
                    empty,
                    info,
                    info_full,
                    info_empty,
                    UP,
                    EXPERTS,
                    TOP_K,
                    N,
                    K,
                    STAGES,
                    COPY_ENGINE,
                    DYNAMIC,
                    AHEAD,
                    DIAG,
                ),
            ),
        ],
        [4, 4],
        [R, P],
    )
