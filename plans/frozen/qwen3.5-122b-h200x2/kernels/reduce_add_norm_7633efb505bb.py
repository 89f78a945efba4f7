"""reduce_add_norm

all_reduce: y = sum of x over the ranks
add: y = x + r
rms_norm: y = x / sqrt(mean(x^2) + eps) * (1 + w)
Source: RMSNorm (arXiv:1910.07467) of a sum over ranks, without a meeting:
each rank pushes its row into slots of all others and polls its own (plans/peer_memory.py)

Grid: (program). Each adds up and normalises some rows in turns, in the order of the
ranks; all programs run at once.
H hidden size, BLOCK_H the same as a power of two; WORLD ranks; SLOT and ROW are elements of a slot
and of all slots of a row, GENERATIONS times WORLD; `n` counts dimensions. An empty place is 0.
"""

import triton
import triton.language as tl


@triton.jit
def _poll(slot, tag, signals, H: tl.constexpr, BLOCK_H: tl.constexpr, STOP: tl.constexpr):
    """A slot and its header; and a state: 0 all is there, below `BLOCK_H` + 1 something lacks, else
    there is nothing to wait for.

    A sum over the block, since threads that see a word at different times must not part.
    """
    n = tl.arange(0, BLOCK_H)
    here = tl.load(slot + n, mask=n < H, other=1, volatile=True)
    seen = tl.load((slot + H).to(tl.pointer_type(tl.int32)), volatile=True)
    over = tl.load(signals + STOP, volatile=True) != 0
    over |= (seen != 0) & (seen != tag)
    lacks = ((here == 0) | (seen == 0)).to(tl.int32)
    state = tl.sum(tl.where(over, 2 * BLOCK_H, lacks), 0)
    return here, seen, state


@triton.jit
def _give_up(
    signals, peers, rank, error, WORLD: tl.constexpr, STOP: tl.constexpr, ERROR: tl.constexpr
):
    """End the waits of all ranks; say why, unless this rank was told to."""
    if tl.load(signals + STOP, volatile=True) == 0:
        tl.store(signals + ERROR, error)
    place = signals.to(tl.int64) - tl.load(peers + rank)
    for peer in tl.static_range(WORLD):
        theirs = (tl.load(peers + peer) + place).to(tl.pointer_type(tl.int32))
        tl.store(theirs + STOP, 1)


@triton.jit
def reduce_add_norm(
    all_reduce_x,  # input, bf16 [num_tokens, 3072]
    add_r,  # input, bf16 [num_tokens, 3072]
    rms_norm_w,  # weight, bf16 [3072]
    rms_norm_y,  # output, bf16 [num_tokens, 3072]
    peer_slots,  # symmetric, i32 [num_tokens, 3, 2, 1540]
    peer_counts,  # symmetric, i32 [num_tokens]
    peer_signals,  # symmetric, i32 [8]
    peers,  # peer_table, i64 [2]
    rank,  # i32
    program,  # i32
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK_H: tl.constexpr = 4096
    COUNTS: tl.constexpr = 3145728
    EPS: tl.constexpr = 1e-06
    ERROR: tl.constexpr = 1
    GENERATIONS: tl.constexpr = 3
    H: tl.constexpr = 3072
    MAGNITUDE: tl.constexpr = 32767
    POLLS: tl.constexpr = 134217728
    ROW: tl.constexpr = 18480
    SIGN: tl.constexpr = -32768
    SLOT: tl.constexpr = 3080
    STOP: tl.constexpr = 0
    TAGS: tl.constexpr = 16384
    WORLD: tl.constexpr = 2

    n = tl.arange(0, BLOCK_H)
    ok = n < H
    base = tl.load(peers + rank)
    w = tl.load(rms_norm_w + n, mask=ok, other=0.0)
    first, stride = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    for t in range(first, num_tokens, stride):
        own = tl.load(all_reduce_x + t * H + n, mask=ok, other=0.0)
        count = tl.load(peer_counts + t)
        r = tl.load(add_r + t * H + n, mask=ok, other=0.0)
        generation = count % GENERATIONS
        before = (count + GENERATIONS - 1) % GENERATIONS
        tag = (count % TAGS) * 65536 + program + 1  # never 0
        place = peer_slots.to(tl.int64) - base  # in the arena of each rank
        mine = peer_slots.to(tl.pointer_type(tl.int16)) + t * ROW
        sent = own.to(tl.int16, bitcast=True)
        sent = tl.where((sent & MAGNITUDE) == 0, SIGN, sent)  # +0 goes as -0: 0 is an empty place
        for step in tl.static_range(1, WORLD):
            theirs = tl.load(peers + (rank + step) % WORLD) + place
            theirs = tl.multiple_of(theirs.to(tl.pointer_type(tl.int16)), 16)
            slot = theirs + t * ROW + (generation * WORLD + rank) * SLOT
            tl.store(slot + n, sent, mask=ok, cache_modifier=".wt")
            tl.store((slot + H).to(tl.pointer_type(tl.int32)), tag, cache_modifier=".wt")
        for step in tl.static_range(1, WORLD):  # what the call before this one has read
            slot = mine + (before * WORLD + (rank + step) % WORLD) * SLOT
            tl.store(slot + n, tl.zeros([BLOCK_H], tl.int16), mask=ok)
            tl.store((slot + H).to(tl.pointer_type(tl.int32)), 0)
        tl.debug_barrier()  # all is sent before anything is waited for
        x = tl.zeros([BLOCK_H], tl.float32)
        for peer in tl.static_range(WORLD):
            part = own
            if peer != rank:
                slot = mine + (generation * WORLD + peer) * SLOT
                here, seen, state = _poll(slot, tag, peer_signals, H, BLOCK_H, STOP)
                polls = POLLS
                while (state > 0) & (state <= BLOCK_H) & (polls > 0):
                    here, seen, state = _poll(slot, tag, peer_signals, H, BLOCK_H, STOP)
                    polls -= 1
                if state != 0:
                    error = (peer + 1) * 65536 + tl.where(seen == tag, 0, seen & 65535)
                    _give_up(peer_signals, peers, rank, error, WORLD, STOP, ERROR)
                part = here.to(tl.bfloat16, bitcast=True)
            x += part.to(tl.float32)
        tl.store(peer_counts + t, (count + 1) % COUNTS)
        x += r.to(tl.float32)
        x *= tl.rsqrt(tl.sum(x * x, 0) / H + EPS) * (1.0 + w.to(tl.float32))
        tl.store(rms_norm_y + t * H + n, x, mask=ok)
