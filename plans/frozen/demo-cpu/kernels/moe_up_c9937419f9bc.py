"""moe_up

topk: p = softmax(logits); ids = indices of the k largest; weights = p[ids] / sum(p[ids])
experts_up: y[t, j] = silu(x[t] G^T) * (x[t] U^T), G and U of expert ids[t, j]
linear: y = x w^T, split into columns of the sizes `splits`
silu_mul: y = silu(x[:, :n]) * x[:, n:]
Source: mixture of experts, SwiGLU (arXiv:2002.05202); each program recomputes the top-k

Grid: (token, its experts and the shared one, block of channels), tokens side by side, so that those
with the same expert share its reads. One program computes BLOCK_N channels of one expert.
H hidden size, INNER and SHARED inner sizes of a routed and the shared expert, LOCAL experts of this
rank of EXPERTS in all (BLOCK_E: as a power of two), TOP_K of a token; `slot` counts its experts.
"""

import triton
import triton.language as tl


@triton.jit
def _keys(logits, e):
    """An integer for each expert: larger for a better logit, among equals for the first one."""
    bits = logits.to(tl.float32).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ordered.to(tl.int64) * 65536 + (65535 - e)


@triton.jit
def _without(key, best):
    """The keys, with the smallest integer in place of `best`."""
    return tl.where(key == best, tl.full([], -(1 << 62), tl.int64), key)


@triton.jit
def _logit(best):
    """The logit of a key."""
    ordered = (best >> 16).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _expert(best):
    """The expert of a key."""
    return (65535 - (best & 65535)).to(tl.int32)


@triton.jit
def moe_up(
    topk_logits,  # input, fp32 [num_tokens, 8]
    experts_up_x,  # input, fp32 [num_tokens, 256]
    experts_up_w,  # weight, fp32 [8, 256, 256]
    linear_w,  # weight, fp32 [256, 256]
    experts_up_y,  # output, fp32 [num_tokens, 256]
    silu_mul_y,  # output, fp32 [num_tokens, 128]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK_E: tl.constexpr = 8
    BLOCK_K: tl.constexpr = 128
    BLOCK_N: tl.constexpr = 32
    EXPERTS: tl.constexpr = 8
    H: tl.constexpr = 256
    INNER: tl.constexpr = 128
    LOCAL: tl.constexpr = 8
    SHARED: tl.constexpr = 128
    STAGES: tl.constexpr = 1
    TOP_K: tl.constexpr = 2
    WARPS: tl.constexpr = 8

    t, slot = tl.program_id(0), tl.program_id(1)
    first = tl.program_id(2) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    if slot < TOP_K:
        # Each warp has all logits and chooses by itself, so that no round waits for another warp.
        e = tl.broadcast_to(tl.arange(0, BLOCK_E)[None, :], (WARPS, BLOCK_E))
        logits = tl.load(
            topk_logits + t * EXPERTS + e, mask=e < EXPERTS, other=float("-inf")
        ).to(tl.float32)
        key = _keys(logits, e)
        for _ in range(slot):
            key = _without(key, tl.max(key, 1, keep_dims=True))
        mine = _expert(tl.max(tl.max(key, 1), 0))
        is_local = (mine >= 0) & (mine < LOCAL)
        weight = (
            experts_up_w + tl.where(is_local, mine, 0).to(tl.int64) * (2 * INNER * H) + first * H
        )
        half = INNER
    else:
        is_local = slot == TOP_K
        weight = linear_w + first.to(tl.int64) * H
        half = SHARED
    ok = n < half - first
    gate = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for k0 in tl.range(0, H, BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(experts_up_x + t * H + k, mask=k < H, other=0.0).to(tl.float32)
        mask = (ok & is_local)[:, None] & (k < H)[None, :]
        offsets = n[:, None] * H + k[None, :]
        gate += tl.load(weight + offsets, mask=mask, other=0.0).to(tl.float32) * x[None, :]
        up += tl.load(weight + half * H + offsets, mask=mask, other=0.0).to(tl.float32) * x[None, :]
    out = tl.sum(gate, 1)
    out = out * tl.sigmoid(out) * tl.sum(up, 1)
    if slot < TOP_K:
        tl.store(experts_up_y + (t * TOP_K + slot) * INNER + first + n, out, mask=ok)
    else:
        tl.store(silu_mul_y + t * SHARED + first + n, out, mask=ok)
