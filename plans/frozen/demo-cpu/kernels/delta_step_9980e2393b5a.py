"""delta_step

ring_conv: y[t] = silu(sum_j w[j] x[t - K + 1 + j]); conv_state[p % K] = x at position p
qk_l2_norm: q = q / |q| / sqrt(key_dim); k = k / |k|; v = v
delta_gates: beta = sigmoid(b); log_decay = -exp(a_log) softplus(a + dt_bias)
delta_rule: g = log_decay; S = e^g S; S += k (beta (v - S^T k))^T; y = S^T q
gated_norm: y = x / sqrt(mean(x^2) + eps) * w * silu(z), per head
Source: Gated DeltaNet, one token (arXiv:2412.06464):
S = e^g S; S += k (beta (v - S^T k))^T; y = S^T q

Grid: (block of columns, value head, sequence). One program moves BLOCK_V columns of one head's
state [DK, DV] on by one token.
A key heads of DK, B value heads of DV, GROUP = B / A; CHANNELS of q, k and v together, TAPS of the
convolution (BLOCK_TAPS: as a power of two); `c` counts channels, `i` and `j` rows and columns of a
state.
"""

import triton
import triton.language as tl


@triton.jit
def _window(
    w_ptr,
    state_ptr,
    src,
    c,
    position,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
):
    """The last inputs of the convolution for the channels `c`, and its weights: [BLOCK_TAPS, c]."""
    t = tl.arange(0, BLOCK_TAPS)[:, None]
    entry = src * TAPS + (position + 1 + t) % TAPS
    old = tl.load(state_ptr + entry * CHANNELS + c[None, :], mask=t < TAPS - 1, other=0.0)
    return old, tl.load(w_ptr + c[None, :] * TAPS + t, mask=t < TAPS, other=0.0).to(tl.float32)


@triton.jit
def _with_newest(
    x_ptr, old, s, c, CHANNELS: tl.constexpr, TAPS: tl.constexpr, BLOCK_TAPS: tl.constexpr
):
    """The window and the newest input after it."""
    t = tl.arange(0, BLOCK_TAPS)[:, None]
    return tl.where(t == TAPS - 1, tl.load(x_ptr + s * CHANNELS + c)[None, :], old)


@triton.jit
def _conv(x, w):
    """One step of the convolution, and its SiLU."""
    y = tl.sum(x.to(tl.float32) * w, 0)
    return y * tl.sigmoid(y)


@triton.jit
def _keep(
    x,
    state_ptr,
    src,
    dst,
    c,
    position,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
):
    """Write the newest input; where the slot is another than was read, those before it, too."""
    t = tl.arange(0, BLOCK_TAPS)[:, None]
    entry = dst * TAPS + (position + 1 + t) % TAPS
    is_new = (t == TAPS - 1) | ((src != dst) & (t > 0) & (t < TAPS))
    tl.store(state_ptr + entry * CHANNELS + c[None, :], x, mask=is_new)


@triton.jit
def delta_step(
    ring_conv_x,  # input, fp32 [num_tokens, 512]
    ring_conv_cu_seqlens,  # input, i32 [num_seqs+1]
    ring_conv_src_state_slots,  # input, i32 [num_seqs]
    ring_conv_dst_state_slots,  # input, i32 [num_seqs]
    ring_conv_context_lens,  # input, i32 [num_seqs]
    delta_gates_b,  # input, fp32 [num_tokens, 8]
    delta_gates_a,  # input, fp32 [num_tokens, 8]
    gated_norm_z,  # input, fp32 [num_tokens, 256]
    ring_conv_w,  # weight, fp32 [512, 1, 4]
    delta_gates_a_log,  # weight, fp32 [8]
    delta_gates_dt_bias,  # weight, fp32 [8]
    gated_norm_w,  # weight, fp32 [32]
    ring_conv_conv_state,  # state, fp32 [36, 4, 512]
    delta_rule_ssm_state,  # state, fp32 [36, 8, 32, 32]
    gated_norm_y,  # output, fp32 [num_tokens, 256]
    num_tokens,  # i32
    num_seqs,  # i32
):
    A: tl.constexpr = 4
    B: tl.constexpr = 8
    BLOCK_TAPS: tl.constexpr = 4
    BLOCK_V: tl.constexpr = 32
    CHANNELS: tl.constexpr = 512
    DK: tl.constexpr = 32
    DV: tl.constexpr = 32
    EPS: tl.constexpr = 1e-06
    GROUP: tl.constexpr = 2
    L2_EPS: tl.constexpr = 1e-06
    SCALE: tl.constexpr = 0.1767766952966369
    TAPS: tl.constexpr = 4

    column, head, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    key_head = head // GROUP
    i = tl.arange(0, DK)
    j = column * BLOCK_V + tl.arange(0, BLOCK_V)
    state_offsets = i[:, None] * DV + j[None, :]
    src = tl.load(ring_conv_src_state_slots + s).to(tl.int64)
    dst = tl.load(ring_conv_dst_state_slots + s).to(tl.int64)
    position = tl.load(ring_conv_context_lens + s) - 1
    state = tl.load(delta_rule_ssm_state + (src * B + head) * DK * DV + state_offsets).to(tl.float32)
    q_c, k_c, v_c = key_head * DK + i, (A + key_head) * DK + i, 2 * A * DK + head * DV + j
    q_old, q_w = _window(
        ring_conv_w, ring_conv_conv_state, src, q_c, position, CHANNELS, TAPS, BLOCK_TAPS
    )
    k_old, k_w = _window(
        ring_conv_w, ring_conv_conv_state, src, k_c, position, CHANNELS, TAPS, BLOCK_TAPS
    )
    v_old, v_w = _window(
        ring_conv_w, ring_conv_conv_state, src, v_c, position, CHANNELS, TAPS, BLOCK_TAPS
    )
    rate = -tl.exp(tl.load(delta_gates_a_log + head))
    bias = tl.load(delta_gates_dt_bias + head)
    scale = tl.load(gated_norm_w + tl.arange(0, DV))
    b = tl.load(delta_gates_b + s * B + head).to(tl.float32)
    a = tl.load(delta_gates_a + s * B + head).to(tl.float32)
    row = (s * B + head) * DV
    z = tl.load(gated_norm_z + row + tl.arange(0, DV)).to(tl.float32)
    q_in = _with_newest(ring_conv_x, q_old, s, q_c, CHANNELS, TAPS, BLOCK_TAPS)
    k_in = _with_newest(ring_conv_x, k_old, s, k_c, CHANNELS, TAPS, BLOCK_TAPS)
    v_in = _with_newest(ring_conv_x, v_old, s, v_c, CHANNELS, TAPS, BLOCK_TAPS)
    q, k, v = _conv(q_in, q_w), _conv(k_in, k_w), _conv(v_in, v_w)
    q *= tl.rsqrt(tl.sum(q * q, 0) + L2_EPS) * SCALE
    k *= tl.rsqrt(tl.sum(k * k, 0) + L2_EPS)
    softplus = tl.maximum(a + bias, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(a + bias)))
    decay = tl.exp(rate * softplus)
    # Both products are with the old state, so that neither waits for the other:
    # y = (e^g S + k change^T)^T q = e^g S^T q + (k . q) change.
    change = tl.sigmoid(b) * (v - decay * tl.sum(state * k[:, None], 0))
    part = decay * tl.sum(state * q[:, None], 0) + tl.sum(k * q, 0) * change
    state = decay * state + k[:, None] * change[None, :]
    dst_state = delta_rule_ssm_state + (dst * B + head) * DK * DV
    # Of the programs that share a key head, one keeps its inputs.
    leads = (head % GROUP == 0) & (column == 0)
    tl.store(dst_state + state_offsets, state)
    _keep(
        v_in, ring_conv_conv_state, src, dst, v_c, position, CHANNELS, TAPS, BLOCK_TAPS
    )
    if leads:
        _keep(
            q_in, ring_conv_conv_state, src, dst, q_c, position, CHANNELS, TAPS, BLOCK_TAPS
        )
        _keep(
            k_in, ring_conv_conv_state, src, dst, k_c, position, CHANNELS, TAPS, BLOCK_TAPS
        )
    y = part
    y *= tl.rsqrt(tl.sum(y * y, 0) / DV + EPS) * scale * z * tl.sigmoid(z)
    tl.store(gated_norm_y + row + tl.arange(0, DV), y)
