"""accept

accept: n = length of the common prefix of token_ids[1:] and next_tokens, up to the first of `stop_ids` and lens <= max_lens; lens = context_lens - R + n + 1; last_tokens = next_tokens[n]; accept_counts[:n + 1] += 1
Source: speculative sampling (arXiv:2211.17192); a draft that is proposed with certainty is right where the target says it too
"""

import triton
import triton.language as tl


@triton.jit
def _mix(x, SHIFT: tl.constexpr, FACTOR: tl.constexpr):
    return (x ^ (x >> SHIFT)) * FACTOR


@triton.jit
def _uniform(seed, rng_offset):
    x = seed.to(tl.uint64, bitcast=True) + (rng_offset + 1).to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
    x = _mix(_mix(x, 30, 0xBF58476D1CE4E5B9), 27, 0x94D049BB133111EB)
    return ((x ^ (x >> 31)) >> 40).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def accept(
    token_ids,  # input, i32 [num_tokens]
    next_tokens,  # input, i32 [num_tokens]
    context_lens,  # input, i32 [num_seqs]
    src_state_slots,  # input, i32 [num_seqs]
    max_lens,  # input, i32 [num_seqs]
    stop_ids,  # input, i32 [num_seqs, 8]
    seed,  # input, i64 [num_seqs]
    rng_offset,  # input, i64 [num_seqs]
    forced_accept,  # input, fp32 [4]
    accept_counts,  # state, i64 [4]
    accepted,  # output, i32 [num_seqs]
    lens,  # output, i32 [num_seqs]
    last_tokens,  # output, i32 [num_seqs]
    num_tokens,
    num_seqs,
):
    BLOCK: tl.constexpr = 2
    BLOCK_R: tl.constexpr = 4
    ROWS: tl.constexpr = 4
    STOPS: tl.constexpr = 8
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may take its place on the machine
    tl.extra.cuda.gdc_wait()  # all before this one is done and visible

    s = tl.arange(0, BLOCK)
    r = tl.arange(0, BLOCK_R)
    ok = s < num_seqs
    live = tl.load(src_state_slots + s, mask=ok, other=0) > 0  # others are padding, and not counted
    before = tl.load(context_lens + s, mask=ok, other=0) - ROWS
    room = tl.load(max_lens + s, mask=ok, other=0) - before - 1
    stops = tl.load(stop_ids + s[:, None] * STOPS + tl.arange(0, STOPS)[None, :], mask=ok[:, None], other=-1)
    seeds = tl.load(seed + s, mask=ok, other=0)
    draws = tl.load(rng_offset + s, mask=ok, other=0)
    right = ok
    count = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(ROWS - 1):
        said = tl.load(next_tokens + s * ROWS + i, mask=ok, other=-1)
        same = said == tl.load(token_ids + s * ROWS + i + 1, mask=ok, other=-1)
        forced = tl.load(forced_accept + i)
        right &= tl.where(forced != 0.0, _uniform(seeds, draws + i) < forced, same)
        right &= tl.sum((said[:, None] == stops).to(tl.int32), 1) == 0
        count += right.to(tl.int32)
    count = tl.maximum(tl.minimum(count, room), 0)
    last = tl.load(next_tokens + s * ROWS + count, mask=ok, other=0)
    tl.store(accepted + s, count, mask=ok)
    tl.store(lens + s, before + count + 1, mask=ok)
    tl.store(last_tokens + s, last, mask=ok)
    reached = tl.sum(((r[None, :] <= count[:, None]) & live[:, None]).to(tl.int32), 0)
    tl.atomic_add(accept_counts + r, reached.to(tl.int64), mask=r < ROWS)
