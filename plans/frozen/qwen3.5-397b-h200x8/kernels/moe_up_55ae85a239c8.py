"""moe_up

topk: p = softmax(logits); ids = indices of the k largest; weights = p[ids] / sum(p[ids])
experts_up: y[t, j] = silu(x[t] G^T) * (x[t] U^T), G and U of expert ids[t, j]
linear: y = x w^T, split into columns of the sizes `splits`
silu_mul: y = silu(x[:, :n]) * x[:, n:]
Source: mixture of experts, SwiGLU (arXiv:2002.05202); each program recomputes the top-k

Grid: (token, its experts and the shared one, block of channels), tokens side by side, so that those
with the same expert share its reads. One program computes BLOCK_N channels of one expert, on the
tensor cores: x is each of COLUMNS columns, the fewest that they take.
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
def _turned(w, ROWS: tl.constexpr):
    """Four runs of each row, in the order in which the tensor cores take them from four threads.

    A product does not mind the order of its depth. So each thread keeps the run that it loaded.
    """
    runs = tl.reshape(w.to(tl.float16), (ROWS, 4, 4, 4))
    return tl.reshape(tl.permute(runs, (0, 2, 1, 3)), (ROWS, 64))


@triton.jit
def moe_up(
    topk_logits,  # input, bf16 [num_seqs, 512]
    experts_up_x,  # input, bf16 [num_seqs, 4096]
    experts_up_w,  # weight, fp8[128x128]:fp32 [512, 256, 4096]
    linear_w,  # weight, fp8[128x128]:fp32 [256, 4096]
    experts_up_y,  # output, bf16 [num_seqs, 1280]
    silu_mul_y,  # output, bf16 [num_seqs, 128]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK: tl.constexpr = 128
    BLOCK_E: tl.constexpr = 512
    BLOCK_K: tl.constexpr = 128
    BLOCK_N: tl.constexpr = 16
    COLUMNS: tl.constexpr = 8
    EXPERTS: tl.constexpr = 512
    H: tl.constexpr = 4096
    INNER: tl.constexpr = 128
    LOCAL: tl.constexpr = 512
    SHARED: tl.constexpr = 128
    TOP_K: tl.constexpr = 10
    WARPS: tl.constexpr = 1
    tl.extra.cuda.gdc_wait()  # results of earlier kernels are visible
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel prefetches what older kernels wrote

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
    gate = tl.zeros([BLOCK_N, COLUMNS], tl.float32)
    up = tl.zeros([BLOCK_N, COLUMNS], tl.float32)
    up_scales = scales + half // BLOCK * (H // BLOCK)
    d = tl.arange(0, 64)
    turned = d // 4 % 4 * 16 + d // 16 * 4 + d % 4  # where an element of the depth lies
    offsets = n[:, None] * H + (0 + 0 + tl.arange(0, 64))[None, :]
    gate_0 = tl.load(weight + offsets, mask=(ok & is_local)[:, None], other=0.0)
    up_0 = tl.load(
        weight + half * H + offsets, mask=(ok & is_local)[:, None], other=0.0
    )
    offsets = n[:, None] * H + (0 + 64 + tl.arange(0, 64))[None, :]
    gate_1 = tl.load(weight + offsets, mask=(ok & is_local)[:, None], other=0.0)
    up_1 = tl.load(
        weight + half * H + offsets, mask=(ok & is_local)[:, None], other=0.0
    )
    factor = tl.load(scales + 0 // BLOCK)
    up_factor = tl.load(up_scales + 0 // BLOCK)

    for k0 in tl.static_range(0, H, BLOCK_K):
        x_0 = tl.load(experts_up_x + t * H + k0 + 0 + turned)
        x_1 = tl.load(experts_up_x + t * H + k0 + 64 + turned)
        if k0 + BLOCK_K < H:
            offsets = n[:, None] * H + ((k0 + BLOCK_K) + 0 + tl.arange(0, 64))[None, :]
            next_gate_0 = tl.load(weight + offsets, mask=(ok & is_local)[:, None], other=0.0)
            next_up_0 = tl.load(
                weight + half * H + offsets, mask=(ok & is_local)[:, None], other=0.0
            )
            offsets = n[:, None] * H + ((k0 + BLOCK_K) + 64 + tl.arange(0, 64))[None, :]
            next_gate_1 = tl.load(weight + offsets, mask=(ok & is_local)[:, None], other=0.0)
            next_up_1 = tl.load(
                weight + half * H + offsets, mask=(ok & is_local)[:, None], other=0.0
            )
            next_factor = tl.load(scales + (k0 + BLOCK_K) // BLOCK)
            next_up_factor = tl.load(up_scales + (k0 + BLOCK_K) // BLOCK)
        tl.extra.cuda.gdc_wait()  # all loads are on their way
        gate_sum = tl.zeros([BLOCK_N, COLUMNS], tl.float32)
        up_sum = tl.zeros([BLOCK_N, COLUMNS], tl.float32)
        x = tl.broadcast_to(x_0.to(tl.float16)[:, None], (64, COLUMNS))
        gate_sum = tl.dot(_turned(gate_0, BLOCK_N), x, gate_sum)
        up_sum = tl.dot(_turned(up_0, BLOCK_N), x, up_sum)
        x = tl.broadcast_to(x_1.to(tl.float16)[:, None], (64, COLUMNS))
        gate_sum = tl.dot(_turned(gate_1, BLOCK_N), x, gate_sum)
        up_sum = tl.dot(_turned(up_1, BLOCK_N), x, up_sum)
        gate += gate_sum * factor
        up += up_sum * up_factor
        if k0 + BLOCK_K < H:
            gate_0, up_0 = next_gate_0, next_up_0
            gate_1, up_1 = next_gate_1, next_up_1
            factor, up_factor = next_factor, next_up_factor
    out = tl.max(gate, 1)
    out = out * tl.sigmoid(out) * tl.max(up, 1)
    if slot < TOP_K:
        tl.store(experts_up_y + (t * TOP_K + slot) * INNER + first + n, out, mask=ok)
    else:
        tl.store(silu_mul_y + t * SHARED + first + n, out, mask=ok)
