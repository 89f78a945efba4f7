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
Routed experts are in NVFP4; `q` counts quads, four words of 32 elements, BLOCK_Q of them at a time.
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
def _elements(words, J: tl.constexpr):
    """Two elements of each word, of the groups J and J + 4, times 2^-14."""
    bits = words << (12 - 4 * J)
    bits = (bits & -2147450880) | ((bits >> 3) & 234884608)  # signs, and three bits below them
    low = bits.to(tl.int16).to(tl.float16, bitcast=True)
    high = (bits >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _scale(word, J: tl.constexpr):
    """The scale in byte J of a word, times 2^-8."""
    if J == 0:
        bits = word << 7
    else:
        bits = word >> (8 * J - 7)
    return (bits & 32640).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _load_quads(weight, scales, row, q, ok, K: tl.constexpr):
    """Four words of each row and each quad, [quads, rows, 4], and the two words of their scales."""
    i = tl.arange(0, 4)
    words = tl.load(
        weight + (row[None, :] * (K // 8) + q[:, None] * 4)[:, :, None] + i[None, None, :],
        mask=ok[:, :, None],
        other=0,
    )
    at = (row[None, :] * (K // 64) + q[:, None] // 4 * 2)[:, :, None]
    low_scales = tl.load(scales + at, mask=ok[:, :, None], other=0)
    high_scales = tl.load(scales + at + 1, mask=ok[:, :, None], other=0)
    return words, low_scales, high_scales


@triton.jit
def _load_x(x, words, q, K: tl.constexpr, J: tl.constexpr):
    """The four elements of group J of a row of x that meet each quad, [quads, 1, 4]."""
    i = tl.arange(0, 4)
    k = (q // 4 * 128 + q % 4 * 4 + J * 16)[:, None, None] + i[None, None, :]
    return tl.load(x + k).to(tl.float32)


@triton.jit
def _times_x(quads, x, q, K: tl.constexpr):
    """The products of quads of some rows and x, [quads, rows, 1], times 2^-22."""
    words, low_scales, high_scales = quads
    acc = tl.zeros_like(low_scales).to(tl.float32)
    for j in tl.static_range(4):
        low, high = _elements(words, j)
        acc += tl.sum(low * _load_x(x, words, q, K, j), 2, keep_dims=True) * _scale(low_scales, j)
        acc += tl.sum(high * _load_x(x, words, q, K, j + 4), 2, keep_dims=True) * _scale(high_scales, j)
    return acc


@triton.jit
def _shared_sum(
    weight,
    row,
    ok_n,
    x,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """x times some rows of the weight of a shared expert, in blocks of FP8."""
    scales = (weight + ROWS * K).to(tl.pointer_type(tl.float32)) + row // 128 * (K // 128)
    acc = tl.zeros([BLOCK_S // 128, BLOCK_N, 128], tl.float32)
    for k0 in range(0, K, BLOCK_S):
        b = k0 // 128 + tl.arange(0, BLOCK_S // 128)
        k = (b * 128)[:, None, None] + tl.arange(0, 128)[None, None, :]
        ok = ok_n[None, :, None] & (k < K)
        w = tl.load(weight + row[None, :, None] * K + k, mask=ok, other=0.0)
        ok_b = ok_n[None, :] & (b < K // 128)[:, None]
        factor = tl.load(scales[None, :] + b[:, None], mask=ok_b, other=0.0)
        part = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        acc += w.to(tl.float16).to(tl.float32) * (part * factor[:, :, None])
    return tl.sum(tl.sum(acc, 2), 0)


@triton.jit
def moe_up(
    topk_logits,  # input, bf16 [num_tokens, 512]
    experts_up_x,  # input, bf16 [num_tokens, 4096]
    experts_up_w,  # weight, fp4[1x16]:fp8:fp32 [512, 256, 4096]
    linear_w,  # weight, fp8[128x128]:fp32 [256, 4096]
    topk_weights,  # output, bf16 [num_tokens, 10]
    topk_ids,  # output, i32 [num_tokens, 10]
    experts_up_y,  # output, bf16 [num_tokens, 1280]
    silu_mul_y,  # output, bf16 [num_tokens, 128]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK_E: tl.constexpr = 512
    BLOCK_J: tl.constexpr = 16
    BLOCK_N: tl.constexpr = 4
    BLOCK_Q: tl.constexpr = 64
    BLOCK_S: tl.constexpr = 512
    EXPERTS: tl.constexpr = 512
    H: tl.constexpr = 4096
    INNER: tl.constexpr = 128
    LOCAL: tl.constexpr = 512
    SHARED: tl.constexpr = 128
    STAGES: tl.constexpr = 1
    TOP_K: tl.constexpr = 10
    UNIT: tl.constexpr = 4194304.0
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

        held = tl.where(is_local, mine, 0).to(tl.int64)
        behind = experts_up_w + LOCAL * (2 * INNER * (H // 8))
        weight = experts_up_w + held * (2 * INNER * (H // 8))
        factors = behind.to(tl.pointer_type(tl.float32)) + held * (2 * INNER)
        scales = behind + LOCAL * (2 * INNER) + held * (2 * INNER * (H // 64))
        row = first + n
        ok_n = (row < INNER) & is_local
        gate = tl.zeros([BLOCK_Q, BLOCK_N, 1], tl.float32)
        up = tl.zeros([BLOCK_Q, BLOCK_N, 1], tl.float32)
        for q0 in tl.range(0, H // 32, BLOCK_Q, num_stages=STAGES):
            q = q0 + tl.arange(0, BLOCK_Q)
            ok = ok_n[None, :]
            gate_quads = _load_quads(weight, scales, row, q, ok, H)
            up_quads = _load_quads(weight, scales, INNER + row, q, ok, H)
            gate += _times_x(gate_quads, experts_up_x + t * H, q, H)
            up += _times_x(up_quads, experts_up_x + t * H, q, H)
        gate_factor = tl.load(factors + row, mask=ok_n, other=0.0) * UNIT
        up_factor = tl.load(factors + INNER + row, mask=ok_n, other=0.0) * UNIT
        out = tl.sum(tl.sum(gate, 2), 0) * gate_factor
        out = out * tl.sigmoid(out) * (tl.sum(tl.sum(up, 2), 0) * up_factor)
        tl.store(experts_up_y + (t * TOP_K + slot) * INNER + row, out, mask=row < INNER)
    else:
        row = first + n
        ok_n = row < SHARED
        out = _shared_sum(
            linear_w,
            row,
            ok_n,
            experts_up_x + t * H,
            2 * SHARED,
            H,
            BLOCK_N,
            BLOCK_S,
        )
        out = out * tl.sigmoid(out) * _shared_sum(
            linear_w,
            SHARED + row,
            ok_n,
            experts_up_x + t * H,
            2 * SHARED,
            H,
            BLOCK_N,
            BLOCK_S,
        )
        tl.store(silu_mul_y + t * SHARED + row, out, mask=ok_n)
