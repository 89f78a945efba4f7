"""reduce_add_norm

all_reduce: the sum over all ranks
add: y = x + r
rms_norm: y = x / sqrt(mean(x^2) + eps) * (1 + w)
Source: RMSNorm (arXiv:1910.07467) of the residual stream, after a one-shot all-reduce over peer memory: each rank reads all parts, in the same order
"""

import triton
import triton.language as tl


@triton.jit
def _barrier(signals, slot, rank, WORLD: tl.constexpr):
    """All ranks have come here: each sets its flag at every peer, and clears those that the peers set here."""
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
    peers,
    signals,
    rank,
    num_tokens,
    num_seqs,
):
    BLOCK_H: tl.constexpr = 4096
    EPS: tl.constexpr = 1e-06
    H: tl.constexpr = 4096
    WORLD: tl.constexpr = 8
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may take its place on the machine
    tl.extra.cuda.gdc_wait()  # all before this one is done and visible

    t = tl.program_id(0)
    n = tl.arange(0, BLOCK_H)
    ok = n < H
    _barrier(signals, 2 * t * WORLD, rank, WORLD)  # the parts are there
    x = tl.zeros([BLOCK_H], tl.float32)
    for peer in tl.static_range(WORLD):
        part = tl.load(peers + peer).to(tl.pointer_type(tl.bfloat16))
        x += tl.load(part + t * H + n, mask=ok, other=0.0).to(tl.float32)
    _barrier(signals, (2 * t + 1) * WORLD, rank, WORLD)  # nobody reads them any more
    x += tl.load(add_r + t * H + n, mask=ok, other=0.0).to(tl.float32)
    tl.store(add_y + t * H + n, x, mask=ok)
    x *= tl.rsqrt(tl.sum(x * x, 0) / H + EPS) * (1.0 + tl.load(rms_norm_w + n, mask=ok, other=0.0).to(tl.float32))
    tl.store(rms_norm_y + t * H + n, x, mask=ok)
