"""moe_down

topk: p = softmax(logits); ids = indices of the k largest; weights = p[ids] / sum(p[ids])
experts_down: y[t] = sum_j weights[t, j] h[t, j] D^T, D of expert ids[t, j]
linear: y = x w^T, split into columns of the sizes `splits`
gated_add: y = r + x * sigmoid(g), g one scalar for each token
Source: mixture of experts: the weighted sum of the chosen experts, and the gated shared one;
it recomputes the top-k of the kernel before it, so that it can prefetch the experts' weights

Grid: (token, block of columns), tokens side by side, so that those with the same expert share its
reads. One program computes BLOCK_N columns of one token, over all its experts.
H hidden size, INNER and SHARED inner sizes of a routed and the shared expert, LOCAL experts of this
rank, TOP_K of a token, EXPERTS in all (BLOCK_E: as a power of two); `n` counts columns,
`k` inner dimensions, `j` experts of the token.
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
def moe_down(
    topk_logits,  # input, bf16 [num_seqs, 256]
    experts_down_h,  # input, bf16 [num_seqs, 4096]
    linear_x,  # input, bf16 [num_seqs, 512]
    gated_add_g,  # input, bf16 [num_seqs, 1]
    experts_down_w,  # weight, bf16 [256, 3072, 512]
    linear_w,  # weight, bf16 [3072, 512]
    gated_add_y,  # output, bf16 [num_seqs, 3072]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK_E: tl.constexpr = 256
    BLOCK_K: tl.constexpr = 256
    BLOCK_N: tl.constexpr = 1
    EXPERTS: tl.constexpr = 256
    H: tl.constexpr = 3072
    INNER: tl.constexpr = 512
    LOCAL: tl.constexpr = 256
    SHARED: tl.constexpr = 512
    TOP_K: tl.constexpr = 8
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may start
    t = tl.program_id(0)
    first = tl.program_id(1) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    ok = first + n < H
    k = tl.arange(0, BLOCK_K)
    prefetched_shared = tl.load(
        linear_w + first.to(tl.int64) * SHARED + n[:, None] * SHARED + k[None, :],
        mask=ok[:, None] & (k < SHARED)[None, :],
        other=0.0,
    )
    e = tl.arange(0, BLOCK_E)
    logits = tl.load(
        topk_logits + t * EXPERTS + e, mask=e < EXPERTS, other=float("-inf")
    ).to(tl.float32)
    key = _keys(logits, e)
    experts, is_local, scores, prefetched = (), (), (), ()
    for j in tl.static_range(TOP_K):
        best = tl.max(key, 0)
        experts = experts + (_expert(best),)
        is_local = is_local + ((experts[j] >= 0) & (experts[j] < LOCAL),)
        scores = scores + (_logit(best),)
        key = _without(key, best)
        prefetched = prefetched + (
            tl.load(
                experts_down_w
                + (tl.where(is_local[j], experts[j], 0).to(tl.int64) * H + first) * INNER
                + n[:, None] * INNER
                + k[None, :],
                mask=(ok & is_local[j])[:, None] & (k < INNER)[None, :],
                other=0.0,
            ),
        )
    tl.extra.cuda.gdc_wait()  # results of earlier kernels are visible

    total, shares = 0.0, ()
    for j in tl.static_range(TOP_K):
        total += tl.exp(scores[j] - scores[0])
    for j in tl.static_range(TOP_K):
        shares = shares + (tl.exp(scores[j] - scores[0]) / total,)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for j in tl.static_range(TOP_K):  # unrolled, so that all experts' weights are loaded at once
        for k0 in tl.static_range(0, INNER, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = tl.load(
                experts_down_h + (t * TOP_K + j) * INNER + k,
                mask=is_local[j] & (k < INNER),
                other=0.0,
            )
            w = prefetched[j]
            if k0 > 0:
                w = tl.load(
                    experts_down_w
                    + (tl.where(is_local[j], experts[j], 0).to(tl.int64) * H + first) * INNER
                    + n[:, None] * INNER
                    + k[None, :],
                    mask=(ok & is_local[j])[:, None] & (k < INNER)[None, :],
                    other=0.0,
                )
            acc += w.to(tl.float32) * (x.to(tl.float32) * shares[j])[None, :]
    gate = tl.sigmoid(tl.load(gated_add_g + t).to(tl.float32))
    for k0 in tl.static_range(0, SHARED, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        w = prefetched_shared
        if k0 > 0:
            w = tl.load(
                linear_w + first.to(tl.int64) * SHARED + n[:, None] * SHARED + k[None, :],
                mask=ok[:, None] & (k < SHARED)[None, :],
                other=0.0,
            )
        x = tl.load(linear_x + t * SHARED + k, mask=k < SHARED, other=0.0).to(tl.float32) * gate
        acc += w.to(tl.float32) * x[None, :]
    out = tl.sum(acc, 1)
    tl.store(gated_add_y + t * H + first + n, out, mask=ok)
