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
    return (ordered & -65536) | (65535 - e)  # the low half of a bf16 as fp32 is empty


@triton.jit
def _without(key, best):
    """The keys, with the smallest integer in place of `best`."""
    return tl.where(key == best, -2147483648, key)


@triton.jit
def _logit(best):
    """The logit of a key."""
    bits = tl.where(best < 0, best ^ 0x7FFFFFFF, best) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _expert(best):
    """The expert of a key."""
    return (65535 - (best & 65535)).to(tl.int32)


@triton.jit
def moe_up(
    topk_logits,  # input, bf16 [num_tokens, 256]
    experts_up_x,  # input, bf16 [num_tokens, 2048]
    experts_up_w,  # weight, bf16 [256, 1024, 2048]
    linear_w,  # weight, bf16 [1024, 2048]
    topk_weights,  # output, bf16 [num_tokens, 8]
    topk_ids,  # output, i32 [num_tokens, 8]
    experts_up_y,  # output, bf16 [num_tokens, 4096]
    silu_mul_y,  # output, bf16 [num_tokens, 512]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK_E: tl.constexpr = 256
    BLOCK_J: tl.constexpr = 8
    BLOCK_K: tl.constexpr = 256
    BLOCK_N: tl.constexpr = 8
    EXPERTS: tl.constexpr = 256
    H: tl.constexpr = 2048
    INNER: tl.constexpr = 512
    LOCAL: tl.constexpr = 256
    SHARED: tl.constexpr = 512
    STAGES: tl.constexpr = 2
    TOP_K: tl.constexpr = 8
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may start
    tl.extra.cuda.gdc_wait()  # results of earlier kernels are visible

    t, slot = tl.program_id(0), tl.program_id(1)
    first = tl.program_id(2) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    if slot < TOP_K:
        e = tl.arange(0, BLOCK_E)
        logits = tl.load(
            topk_logits + t * EXPERTS + e, mask=e < EXPERTS, other=float("-inf")
        ).to(tl.float32)
        key = _keys(logits, e)
        keeps = (slot == TOP_K - 1) & (first == 0)  # one program finds and writes all experts
        j = tl.arange(0, BLOCK_J)
        chosen = tl.zeros([BLOCK_J], tl.int32)
        share = tl.full([BLOCK_J], float("-inf"), tl.float32)
        mine = 0
        for r in range(slot + 1):
            best = tl.max(key, 0)
            mine = _expert(best)
            if keeps:
                chosen = tl.where(j == r, mine, chosen)
                share = tl.where(j == r, _logit(best), share)
            key = _without(key, best)
        if keeps:
            share = tl.exp(share - tl.max(share, 0))
            tl.store(topk_ids + t * TOP_K + j, chosen, mask=j < TOP_K)
            tl.store(topk_weights + t * TOP_K + j, share / tl.sum(share, 0), mask=j < TOP_K)
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
