"""accept

accept: n = number of leading drafts token_ids[1:] that equal next_tokens, up to the first of
stop_ids and lens <= max_lens; lens = context_lens - R + n + 1; last_tokens = next_tokens[n];
accept_counts[:n + 1] += 1
Source: speculative sampling (arXiv:2211.17192); a draft that is proposed with certainty
is accepted where the target model samples the same token

Grid: one program for all sequences: it is a few numbers each.
QUERY_LEN tokens a sequence, of which all but the first are drafts (BLOCK_R: as a power of two);
STOP_IDS tokens that end a sequence; BLOCK sequences at most (a power of two); `s` counts sequences.
"""

import triton
import triton.language as tl


@triton.jit
def _mix(x, SHIFT: tl.constexpr, FACTOR: tl.constexpr):
    """One round of SplitMix64."""
    return (x ^ (x >> SHIFT)) * FACTOR


@triton.jit
def _uniform(seed, rng_offset):
    """A number in [0, 1), the same for the same seed and offset."""
    x = (
        seed.to(tl.uint64, bitcast=True)
        + (rng_offset + 1).to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
    )
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
    forced_accept,  # input, fp32 [5]
    accept_counts,  # state, i64 [5]
    accepted,  # output, i32 [num_seqs]
    lens,  # output, i32 [num_seqs]
    last_tokens,  # output, i32 [num_seqs]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK: tl.constexpr = 4
    BLOCK_R: tl.constexpr = 8
    QUERY_LEN: tl.constexpr = 5
    STOP_IDS: tl.constexpr = 8
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may start
    tl.extra.cuda.gdc_wait()  # results of earlier kernels are visible

    s = tl.arange(0, BLOCK)
    r = tl.arange(0, BLOCK_R)
    ok = s < num_seqs
    live = tl.load(src_state_slots + s, mask=ok, other=0) > 0  # slot 0 is padding, not counted
    before = tl.load(context_lens + s, mask=ok, other=0) - QUERY_LEN
    room = tl.load(max_lens + s, mask=ok, other=0) - before - 1
    stops = tl.load(
        stop_ids + s[:, None] * STOP_IDS + tl.arange(0, STOP_IDS)[None, :],
        mask=ok[:, None],
        other=-1,
    )
    seeds = tl.load(seed + s, mask=ok, other=0)
    rng_offsets = tl.load(rng_offset + s, mask=ok, other=0)
    accepts = ok
    count = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(QUERY_LEN - 1):
        sampled = tl.load(next_tokens + s * QUERY_LEN + i, mask=ok, other=-1)
        same = sampled == tl.load(token_ids + s * QUERY_LEN + i + 1, mask=ok, other=-1)
        forced = tl.load(forced_accept + i)
        accepts &= tl.where(forced != 0.0, _uniform(seeds, rng_offsets + i) < forced, same)
        accepts &= tl.sum((sampled[:, None] == stops).to(tl.int32), 1) == 0
        count += accepts.to(tl.int32)
    count = tl.maximum(tl.minimum(count, room), 0)
    last = tl.load(next_tokens + s * QUERY_LEN + count, mask=ok, other=0)
    tl.store(accepted + s, count, mask=ok)
    tl.store(lens + s, before + count + 1, mask=ok)
    tl.store(last_tokens + s, last, mask=ok)
    reached = tl.sum(((r[None, :] <= count[:, None]) & live[:, None]).to(tl.int32), 0)
    tl.atomic_add(accept_counts + r, reached.to(tl.int64), mask=r < QUERY_LEN)
