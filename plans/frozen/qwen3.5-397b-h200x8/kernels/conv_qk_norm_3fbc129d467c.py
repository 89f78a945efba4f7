"""conv_qk_norm

causal_conv: y[t] = silu(sum_j w[j] x[t - K + 1 + j])
qk_l2_norm: q = q / |q| / sqrt(key_dim); k = k / |k|; v = v
Source: Gated DeltaNet (arXiv:2412.06464): the causal convolution of q, k and v,
and the L2 norm of q and k

Grid: (block of BLOCK_T tokens, head, sequence); heads are those of q, then of k, then of v.
One program computes one head for the tokens of its block.
A key heads of DK, B value heads of DV, CHANNELS of q, k and v together, TAPS of the convolution;
`t` counts tokens of a sequence, `c` channels.
"""

import triton
import triton.language as tl


@triton.jit
def _conv(
    x_ptr,
    w_ptr,
    state_ptr,
    begin,
    count,
    t,
    c,
    src,
    dst,
    first,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Tokens `t` of a sequence, channels `c`; the state holds older inputs, oldest first."""
    y = tl.zeros([t.shape[0], c.shape[0]], tl.float32)
    if first:  # only the first block reads inputs of earlier steps, and writes those for the next
        for j in tl.static_range(TAPS - 1):
            at = t - (TAPS - 1) + j
            kept = tl.load(
                state_ptr + (src * (TAPS - 1) + TAPS - 1 + at)[:, None] * CHANNELS + c[None, :],
                mask=(at < 0)[:, None],
                other=0.0,
            )
            y += kept.to(tl.float32) * tl.load(w_ptr + c * TAPS + j).to(tl.float32)[None, :]
        for j in tl.static_range(TAPS - 1):
            last = count - (TAPS - 1) + j
            fresh = tl.load(
                x_ptr + (begin + last) * CHANNELS + c, mask=(c >= 0) & (last >= 0), other=0.0
            )
            older = tl.load(
                state_ptr + (src * (TAPS - 1) + TAPS - 1 + last) * CHANNELS + c,
                mask=(c >= 0) & (last < 0),
                other=0.0,
            )
            tl.store(state_ptr + (dst * (TAPS - 1) + j) * CHANNELS + c, fresh + older)
    for j in tl.static_range(TAPS):
        at = t - (TAPS - 1) + j
        new = tl.load(
            x_ptr + (begin + at)[:, None] * CHANNELS + c[None, :],
            mask=((at >= 0) & (at < count))[:, None],
            other=0.0,
        )
        y += new.to(tl.float32) * tl.load(w_ptr + c * TAPS + j).to(tl.float32)[None, :]
    return y * tl.sigmoid(y)


@triton.jit
def conv_qk_norm(
    causal_conv_x,  # input, bf16 [num_tokens, 1536]
    causal_conv_cu_seqlens,  # input, i32 [num_seqs+1]
    causal_conv_src_state_slots,  # input, i32 [num_seqs]
    causal_conv_dst_state_slots,  # input, i32 [num_seqs]
    causal_conv_w,  # weight, bf16 [1536, 1, 4]
    causal_conv_conv_state,  # state, bf16 [46, 3, 1536]
    qk_l2_norm_q,  # output, bf16 [num_tokens, 256]
    qk_l2_norm_k,  # output, bf16 [num_tokens, 256]
    qk_l2_norm_v,  # output, bf16 [num_tokens, 1024]
    num_tokens,  # i32
    num_seqs,  # i32
):
    A: tl.constexpr = 2
    B: tl.constexpr = 8
    BLOCK_T: tl.constexpr = 32
    CHANNELS: tl.constexpr = 1536
    DK: tl.constexpr = 128
    DV: tl.constexpr = 128
    L2_EPS: tl.constexpr = 1e-06
    SCALE: tl.constexpr = 0.08838834764831845
    TAPS: tl.constexpr = 4

    block, head, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(causal_conv_cu_seqlens + s)
    count = tl.load(causal_conv_cu_seqlens + s + 1) - begin
    if block * BLOCK_T >= count:
        return
    src = tl.load(causal_conv_src_state_slots + s).to(tl.int64)
    dst = tl.load(causal_conv_dst_state_slots + s).to(tl.int64)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    ok = (t < count)[:, None]
    i = tl.arange(0, DK)
    j = tl.arange(0, DV)
    if head < A:
        y = _conv(
            causal_conv_x,
            causal_conv_w,
            causal_conv_conv_state,
            begin,
            count,
            t,
            head * DK + i,
            src,
            dst,
            block == 0,
            CHANNELS,
            TAPS,
        )
        y *= (tl.rsqrt(tl.sum(y * y, 1) + L2_EPS) * SCALE)[:, None]
        tl.store(qk_l2_norm_q + ((begin + t) * A + head)[:, None] * DK + i[None, :], y, mask=ok)
    elif head < 2 * A:
        y = _conv(
            causal_conv_x,
            causal_conv_w,
            causal_conv_conv_state,
            begin,
            count,
            t,
            head * DK + i,
            src,
            dst,
            block == 0,
            CHANNELS,
            TAPS,
        )
        y *= tl.rsqrt(tl.sum(y * y, 1) + L2_EPS)[:, None]
        tl.store(qk_l2_norm_k + ((begin + t) * A + head - A)[:, None] * DK + i[None, :], y, mask=ok)
    else:
        value = head - 2 * A
        y = _conv(
            causal_conv_x,
            causal_conv_w,
            causal_conv_conv_state,
            begin,
            count,
            t,
            2 * A * DK + value * DV + j,
            src,
            dst,
            block == 0,
            CHANNELS,
            TAPS,
        )
        tl.store(qk_l2_norm_v + ((begin + t) * B + value)[:, None] * DV + j[None, :], y, mask=ok)
