"""reduce_add_norm

all_reduce: y = sum of x over the ranks
add: y = x + r
rms_norm: y = x / sqrt(mean(x^2) + eps) * (1 + w)
Source: RMSNorm (arXiv:1910.07467) of the residual stream;
before it a one-shot all-reduce over peer memory: each rank reads all parts in the same order

Grid: (token). One program adds up and normalises one token.
H hidden size, BLOCK_H the same as a power of two; WORLD ranks; `n` counts dimensions.
"""

import triton
import triton.language as tl


@triton.jit
def _barrier(signals, slot, rank, WORLD: tl.constexpr):
    """Wait for all ranks: set a flag at every peer; wait for those that the peers set here."""
    for peer in tl.static_range(WORLD):
        theirs = tl.load(signals + peer).to(tl.pointer_type(tl.int32)) + slot + rank
        held = tl.atomic_cas(theirs, 0, 1, sem="release", scope="sys")
        while held != 0:
            held = tl.atomic_cas(theirs, 0, 1, sem="release", scope="sys")
    mine = tl.load(signals + rank).to(tl.pointer_type(tl.int32)) + slot
    for peer in tl.static_range(WORLD):
        seen = tl.atomic_cas(mine + peer, 1, 0, sem="acquire", scope="sys")
        while seen != 1:
            seen = tl.atomic_cas(mine + peer, 1, 0, sem="acquire", scope="sys")


@triton.jit
def reduce_add_norm(
    all_reduce_x,  # input, bf16 [num_seqs, 4096]
    add_r,  # input, bf16 [num_seqs, 4096]
    rms_norm_w,  # weight, bf16 [4096]
    add_y,  # output, bf16 [num_seqs, 4096]
    rms_norm_y,  # output, bf16 [num_seqs, 4096]
    peers,  # peer_table, i64 [8]
    signals,  # signal_table, i64 [8]
    rank,  # i32
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK_H: tl.constexpr = 4096
    EPS: tl.constexpr = 1e-06
    H: tl.constexpr = 4096
    WORLD: tl.constexpr = 8
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may start
    tl.extra.cuda.gdc_wait()  # results of earlier kernels are visible

    t = tl.program_id(0)
    n = tl.arange(0, BLOCK_H)
    ok = n < H
    _barrier(signals, 2 * t * WORLD, rank, WORLD)  # all parts are written
    x = tl.zeros([BLOCK_H], tl.float32)
    for peer in tl.static_range(WORLD):
        part = tl.load(peers + peer).to(tl.pointer_type(tl.bfloat16))
        x += tl.load(part + t * H + n, mask=ok, other=0.0).to(tl.float32)
    _barrier(signals, (2 * t + 1) * WORLD, rank, WORLD)  # all parts are read
    x += tl.load(add_r + t * H + n, mask=ok, other=0.0).to(tl.float32)
    tl.store(add_y + t * H + n, x, mask=ok)
    x *= tl.rsqrt(tl.sum(x * x, 0) / H + EPS) * (
        1.0 + tl.load(rms_norm_w + n, mask=ok, other=0.0).to(tl.float32)
    )
    tl.store(rms_norm_y + t * H + n, x, mask=ok)
