"""conv_qk_norm

causal_conv: y[t] = silu(sum_j w[j] x[t - K + 1 + j])
qk_l2_norm: q = q / |q| / sqrt(key_dim); k = k / |k|; v = v
Source: Gated DeltaNet (arXiv:2412.06464): the causal convolution of q, k and v,
and the L2 norm of q and k

Grid: (block of tokens, head, sequence); heads are those of q, then of k, then of v. One program
computes one head for ROWS runs of STEPS tokens each: it goes down all runs at once and keeps the
inputs of the convolution, so that each token is loaded once. Tokens are loaded AHEAD steps before
they are used: no load passes a store by itself, and one at a time does not keep the memory busy.
All loads of the beginning are on their way before the first of them is waited for.
A key heads of DK, B value heads of DV, CHANNELS of q, k and v together, TAPS of the convolution;
`t` counts tokens of a sequence, the first ones of the runs, `c` channels.
"""

import triton
import triton.language as tl


@triton.jit
def _token(x_ptr, begin, count, at, c, CHANNELS: tl.constexpr):
    """Tokens `at` of a sequence, channels `c`, as they are stored; zero outside."""
    ok = (at >= 0) & (at < count)
    return tl.load(x_ptr + (begin + at)[:, None] * CHANNELS + c[None, :], mask=ok[:, None], other=0.0)


@triton.jit
def _older(
    state_ptr,
    at,
    c,
    src,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Tokens `at` before a sequence began, channels `c`: the state has them, oldest first."""
    return tl.load(
        state_ptr + (src * (TAPS - 1) + TAPS - 1 + at)[:, None] * CHANNELS + c[None, :],
        mask=(at < 0)[:, None],
        other=0.0,
    ).to(tl.float32)


@triton.jit
def _keep(
    x_ptr,
    state_ptr,
    begin,
    count,
    c,
    src,
    dst,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Leave the last inputs of a sequence for its next step."""
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


@triton.jit
def _convolve(
    x_ptr,
    w_ptr,
    state_ptr,
    y_ptr,
    stride,
    begin,
    count,
    t,
    c,
    src,
    dst,
    first,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    STEPS: tl.constexpr,
    AHEAD: tl.constexpr,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,
    L2_EPS: tl.constexpr,
):
    """One head of the tokens from `t` on: channels `c`, to a row of WIDTH every `stride`."""
    next0 = _token(x_ptr, begin, count, t + 0, c, CHANNELS)
    next1 = _token(x_ptr, begin, count, t + 1, c, CHANNELS)
    next2 = _token(x_ptr, begin, count, t + 2, c, CHANNELS)
    next3 = _token(x_ptr, begin, count, t + 3, c, CHANNELS)
    before0 = _token(x_ptr, begin, count, t - 3, c, CHANNELS)
    before1 = _token(x_ptr, begin, count, t - 2, c, CHANNELS)
    before2 = _token(x_ptr, begin, count, t - 1, c, CHANNELS)
    weight0 = tl.load(w_ptr + c * TAPS + 0)
    weight1 = tl.load(w_ptr + c * TAPS + 1)
    weight2 = tl.load(w_ptr + c * TAPS + 2)
    weight3 = tl.load(w_ptr + c * TAPS + 3)
    w0 = weight0.to(tl.float32)[None, :]
    w1 = weight1.to(tl.float32)[None, :]
    w2 = weight2.to(tl.float32)[None, :]
    w3 = weight3.to(tl.float32)[None, :]
    x0 = before0.to(tl.float32)
    x1 = before1.to(tl.float32)
    x2 = before2.to(tl.float32)
    if first:  # the first block alone reads and writes the inputs that steps leave
        x0 += _older(state_ptr, t - 3, c, src, CHANNELS, TAPS)
        x1 += _older(state_ptr, t - 2, c, src, CHANNELS, TAPS)
        x2 += _older(state_ptr, t - 1, c, src, CHANNELS, TAPS)
        _keep(x_ptr, state_ptr, begin, count, c, src, dst, CHANNELS, TAPS)
    i = tl.arange(0, WIDTH)
    for step in tl.static_range(STEPS):
        ok = (t + step < count)[:, None]
        row = (begin + t + step)[:, None]
        x3 = next0.to(tl.float32)
        next0 = next1
        next1 = next2
        next2 = next3
        if step + AHEAD < STEPS:
            next3 = _token(x_ptr, begin, count, t + step + AHEAD, c, CHANNELS)
        y = x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3
        y = y / (1.0 + tl.exp(-y))
        if NORM:
            y *= (tl.rsqrt(tl.sum(y * y, 1) + L2_EPS) * SCALE)[:, None]
        tl.store(y_ptr + row * stride + i[None, :], y, mask=ok)
        x0 = x1
        x1 = x2
        x2 = x3


@triton.jit
def conv_qk_norm(
    causal_conv_x,  # input, bf16 [num_tokens, 6144]
    causal_conv_cu_seqlens,  # input, i32 [num_seqs+1]
    causal_conv_src_state_slots,  # input, i32 [num_seqs]
    causal_conv_dst_state_slots,  # input, i32 [num_seqs]
    causal_conv_w,  # weight, bf16 [6144, 1, 4]
    causal_conv_conv_state,  # state, bf16 [58, 3, 6144]
    qk_l2_norm_q,  # output, bf16 [num_tokens, 1024]
    qk_l2_norm_k,  # output, bf16 [num_tokens, 1024]
    qk_l2_norm_v,  # output, bf16 [num_tokens, 4096]
    num_tokens,  # i32
    num_seqs,  # i32
):
    A: tl.constexpr = 8
    AHEAD: tl.constexpr = 4
    B: tl.constexpr = 32
    CHANNELS: tl.constexpr = 6144
    DK: tl.constexpr = 128
    DV: tl.constexpr = 128
    L2_EPS: tl.constexpr = 1e-06
    ROWS: tl.constexpr = 4
    SCALE: tl.constexpr = 0.08838834764831845
    STEPS: tl.constexpr = 16
    TAPS: tl.constexpr = 4

    block, head, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(causal_conv_cu_seqlens + s)
    count = tl.load(causal_conv_cu_seqlens + s + 1) - begin
    if block * (ROWS * STEPS) >= count:
        return
    src = tl.load(causal_conv_src_state_slots + s).to(tl.int64)
    dst = tl.load(causal_conv_dst_state_slots + s).to(tl.int64)
    t = (block * ROWS + tl.arange(0, ROWS)) * STEPS
    i = tl.arange(0, DK)
    j = tl.arange(0, DV)
    if head < A:
        _convolve(
            causal_conv_x,
            causal_conv_w,
            causal_conv_conv_state,
            qk_l2_norm_q + head * DK,
            A * DK,
            begin,
            count,
            t,
            head * DK + i,
            src,
            dst,
            block == 0,
            DK,
            CHANNELS,
            TAPS,
            STEPS,
            AHEAD,
            True,
            SCALE,
            L2_EPS,
        )
    elif head < 2 * A:
        _convolve(
            causal_conv_x,
            causal_conv_w,
            causal_conv_conv_state,
            qk_l2_norm_k + (head - A) * DK,
            A * DK,
            begin,
            count,
            t,
            head * DK + i,
            src,
            dst,
            block == 0,
            DK,
            CHANNELS,
            TAPS,
            STEPS,
            AHEAD,
            True,
            1.0,
            L2_EPS,
        )
    else:
        value = head - 2 * A
        _convolve(
            causal_conv_x,
            causal_conv_w,
            causal_conv_conv_state,
            qk_l2_norm_v + value * DV,
            B * DV,
            begin,
            count,
            t,
            2 * A * DK + value * DV + j,
            src,
            dst,
            block == 0,
            DV,
            CHANNELS,
            TAPS,
            STEPS,
            AHEAD,
            False,
            1.0,
            L2_EPS,
        )
