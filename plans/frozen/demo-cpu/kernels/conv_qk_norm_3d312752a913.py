"""conv_qk_norm

ring_conv: y[t] = silu(sum_j w[j] x[t - K + 1 + j]); conv_state[p % K] = x at position p
qk_l2_norm: q = q / |q| / sqrt(key_dim); k = k / |k|; v = v
Source: Gated DeltaNet (arXiv:2412.06464): the causal convolution of q, k and v,
and the L2 norm of q and k

Grid: (block of BLOCK_T tokens, head, sequence); heads are those of q, then of k, then of v.
One program computes one head for the tokens of its block.
A key heads of DK, B value heads of DV, CHANNELS of q, k and v together, TAPS of the convolution;
`t` counts tokens of a sequence, `c` channels. `start` tokens came before.
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
    start,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Tokens `t` of a sequence, channels `c`; the state holds older inputs, oldest first."""
    y = tl.zeros([t.shape[0], c.shape[0]], tl.float32)
    if first:  # only the first block reads inputs of earlier steps, and writes those for the next
        for j in tl.static_range(TAPS - 1):
            at = t - (TAPS - 1) + j
            kept = tl.load(
                state_ptr + (src * TAPS + (start + at + TAPS) % TAPS)[:, None] * CHANNELS + c[None, :],
                mask=(at < 0)[:, None],
                other=0.0,
            )
            y += kept.to(tl.float32) * tl.load(w_ptr + c * TAPS + j).to(tl.float32)[None, :]
        tl.debug_barrier()  # it may write the slot that it reads
        for j in tl.static_range(TAPS - 1):
            last = count - (TAPS - 1) + j
            fresh = tl.load(
                x_ptr + (begin + last) * CHANNELS + c, mask=(c >= 0) & (last >= 0), other=0.0
            )
            older = tl.load(
                state_ptr + (src * TAPS + (start + last + TAPS) % TAPS) * CHANNELS + c,
                mask=(c >= 0) & (last < 0),
                other=0.0,
            )
            entry = (start + last + TAPS) % TAPS
            tl.store(state_ptr + (dst * TAPS + entry) * CHANNELS + c, fresh + older)
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
    ring_conv_x,  # input, fp32 [num_tokens, 512]
    ring_conv_cu_seqlens,  # input, i32 [num_seqs+1]
    ring_conv_src_state_slots,  # input, i32 [num_seqs]
    ring_conv_dst_state_slots,  # input, i32 [num_seqs]
    ring_conv_context_lens,  # input, i32 [num_seqs]
    ring_conv_w,  # weight, fp32 [512, 1, 4]
    ring_conv_conv_state,  # state, fp32 [36, 4, 512]
    qk_l2_norm_q,  # output, fp32 [num_tokens, 128]
    qk_l2_norm_k,  # output, fp32 [num_tokens, 128]
    qk_l2_norm_v,  # output, fp32 [num_tokens, 256]
    num_tokens,  # i32
    num_seqs,  # i32
):
    A: tl.constexpr = 4
    B: tl.constexpr = 8
    BLOCK_T: tl.constexpr = 64
    CHANNELS: tl.constexpr = 512
    DK: tl.constexpr = 32
    DV: tl.constexpr = 32
    L2_EPS: tl.constexpr = 1e-06
    SCALE: tl.constexpr = 0.1767766952966369
    TAPS: tl.constexpr = 4

    block, head, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(ring_conv_cu_seqlens + s)
    count = tl.load(ring_conv_cu_seqlens + s + 1) - begin
    if block * BLOCK_T >= count:
        return
    start = tl.load(ring_conv_context_lens + s) - count
    src = tl.load(ring_conv_src_state_slots + s).to(tl.int64)
    dst = tl.load(ring_conv_dst_state_slots + s).to(tl.int64)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    ok = (t < count)[:, None]
    i = tl.arange(0, DK)
    j = tl.arange(0, DV)
    if head < A:
        y = _conv(
            ring_conv_x,
            ring_conv_w,
            ring_conv_conv_state,
            begin,
            count,
            t,
            head * DK + i,
            src,
            dst,
            block == 0,
            start,
            CHANNELS,
            TAPS,
        )
        y *= (tl.rsqrt(tl.sum(y * y, 1) + L2_EPS) * SCALE)[:, None]
        tl.store(qk_l2_norm_q + ((begin + t) * A + head)[:, None] * DK + i[None, :], y, mask=ok)
    elif head < 2 * A:
        y = _conv(
            ring_conv_x,
            ring_conv_w,
            ring_conv_conv_state,
            begin,
            count,
            t,
            head * DK + i,
            src,
            dst,
            block == 0,
            start,
            CHANNELS,
            TAPS,
        )
        y *= tl.rsqrt(tl.sum(y * y, 1) + L2_EPS)[:, None]
        tl.store(qk_l2_norm_k + ((begin + t) * A + head - A)[:, None] * DK + i[None, :], y, mask=ok)
    else:
        value = head - 2 * A
        y = _conv(
            ring_conv_x,
            ring_conv_w,
            ring_conv_conv_state,
            begin,
            count,
            t,
            2 * A * DK + value * DV + j,
            src,
            dst,
            block == 0,
            start,
            CHANNELS,
            TAPS,
        )
        tl.store(qk_l2_norm_v + ((begin + t) * B + value)[:, None] * DV + j[None, :], y, mask=ok)
