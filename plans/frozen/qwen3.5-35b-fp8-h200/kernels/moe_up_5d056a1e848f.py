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
Weights are in FP8, with an fp32 factor for each BLOCK x BLOCK elements behind them (`scales`); `b`
counts blocks of the depth.
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
def _load_runs(
    x_ptr, k0, end, BLOCK_K: tl.constexpr, RUN: tl.constexpr
):
    """BLOCK_K elements of a row from k0 on, in two halves of each run; those from `end` on are 0.

    A thread then has what it multiplies with its run of the weight, and nothing goes through shared
    memory.
    """
    run = k0 + tl.arange(0, BLOCK_K // RUN) * RUN
    half = x_ptr + run[:, None] + tl.arange(0, RUN // 2)[None, :]
    ok = (run < end)[:, None]
    low = tl.load(half, mask=ok, other=0.0)
    return low, tl.load(half + RUN // 2, mask=ok, other=0.0)


@triton.jit
def _joined(low, high, BLOCK_K: tl.constexpr, RUN: tl.constexpr):
    """Runs of the two halves of each."""
    both = tl.permute(tl.join(low, high), (0, 2, 1))
    return tl.reshape(both, (BLOCK_K // RUN, RUN)).to(tl.float32)


@triton.jit
def moe_up(
    topk_logits,  # input, bf16 [num_seqs, 256]
    experts_up_x,  # input, bf16 [num_seqs, 2048]
    experts_up_w,  # weight, fp8[128x128]:fp32 [256, 1024, 2048]
    linear_w,  # weight, fp8[128x128]:fp32 [1024, 2048]
    topk_weights,  # output, bf16 [num_seqs, 8]
    topk_ids,  # output, i32 [num_seqs, 8]
    experts_up_y,  # output, bf16 [num_seqs, 4096]
    silu_mul_y,  # output, bf16 [num_seqs, 512]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK: tl.constexpr = 128
    BLOCK_E: tl.constexpr = 256
    BLOCK_J: tl.constexpr = 8
    BLOCK_K: tl.constexpr = 512
    BLOCK_N: tl.constexpr = 2
    EXPERTS: tl.constexpr = 256
    H: tl.constexpr = 2048
    INNER: tl.constexpr = 512
    LOCAL: tl.constexpr = 256
    RUN: tl.constexpr = 16
    SHARED: tl.constexpr = 512
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
        scales = (experts_up_w + LOCAL * (2 * INNER * H)).to(tl.pointer_type(tl.float32))
        scales += tl.where(is_local, mine, 0) * (2 * INNER // BLOCK * (H // BLOCK))
        scales += first // BLOCK * (H // BLOCK)
        half = INNER
    else:
        is_local = slot == TOP_K
        weight = linear_w + first.to(tl.int64) * H
        scales = (linear_w + 2 * SHARED * H).to(tl.pointer_type(tl.float32))
        scales += first // BLOCK * (H // BLOCK)
        half = SHARED
    ok = n < half - first
    gate = tl.zeros([BLOCK_K // RUN, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_K // RUN, BLOCK_N], tl.float32)
    up_scales = scales + half // BLOCK * (H // BLOCK)
    k = 0 + tl.arange(0, BLOCK_K // RUN)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    offsets = n[None, :, None] * H + k[:, None, :]
    mask = (ok & is_local)[None, :, None] & (k < H)[:, None, :]
    gate_w = tl.load(weight + offsets, mask=mask, other=0.0)
    up_w = tl.load(weight + half * H + offsets, mask=mask, other=0.0)
    b = 0 // BLOCK + tl.arange(0, BLOCK_K // RUN) // (BLOCK // RUN)
    factor = tl.load(scales + b, mask=b < H // BLOCK, other=0.0)[:, None]
    up_factor = tl.load(up_scales + b, mask=b < H // BLOCK, other=0.0)[:, None]

    for k0 in tl.static_range(0, H, BLOCK_K):
        low, high = _load_runs(experts_up_x + t * H, k0, H, BLOCK_K, RUN)
        if k0 + BLOCK_K < H:
            k = (k0 + BLOCK_K) + tl.arange(0, BLOCK_K // RUN)[:, None] * RUN + tl.arange(0, RUN)[None, :]
            offsets = n[None, :, None] * H + k[:, None, :]
            mask = (ok & is_local)[None, :, None] & (k < H)[:, None, :]
            next_gate_w = tl.load(weight + offsets, mask=mask, other=0.0)
            next_up_w = tl.load(weight + half * H + offsets, mask=mask, other=0.0)
            b = (k0 + BLOCK_K) // BLOCK + tl.arange(0, BLOCK_K // RUN) // (BLOCK // RUN)
            next_factor = tl.load(scales + b, mask=b < H // BLOCK, other=0.0)[:, None]
            next_up_factor = tl.load(up_scales + b, mask=b < H // BLOCK, other=0.0)[:, None]
        tl.extra.cuda.gdc_wait()  # all loads are on their way
        x = _joined(low, high, BLOCK_K, RUN)
        gate += tl.sum(gate_w.to(tl.float16).to(tl.float32) * x[:, None, :], 2) * factor
        up += tl.sum(up_w.to(tl.float16).to(tl.float32) * x[:, None, :], 2) * up_factor
        if k0 + BLOCK_K < H:
            gate_w, up_w, factor, up_factor = next_gate_w, next_up_w, next_factor, next_up_factor
    out = tl.sum(gate, 0)
    out = out * tl.sigmoid(out) * tl.sum(up, 0)
    if slot < TOP_K:
        tl.store(experts_up_y + (t * TOP_K + slot) * INNER + first + n, out, mask=ok)
    else:
        tl.store(silu_mul_y + t * SHARED + first + n, out, mask=ok)
