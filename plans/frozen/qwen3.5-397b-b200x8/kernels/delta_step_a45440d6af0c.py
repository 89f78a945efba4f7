"""delta_step

causal_conv: y[t] = silu(sum_j w[j] x[t - K + 1 + j])
qk_l2_norm: q = q / |q| / sqrt(key_dim), k = k / |k|, v as it is
delta_gates: sigmoid(b), -exp(a_log) softplus(a + dt_bias)
delta_rule: S = e^g S; S += k (beta (v - S^T k))^T; y = S^T q
gated_norm: y = x / sqrt(mean(x^2) + eps) * w * silu(z), per head
Source: Gated DeltaNet, one token (arXiv:2412.06464): S = e^g S; S += k (beta (v - S^T k))^T; y = S^T q
"""

import triton
import triton.language as tl


@triton.jit
def _window(w_ptr, state_ptr, read, c, CHANNELS: tl.constexpr, TAPS: tl.constexpr, BLOCK_TAPS: tl.constexpr):
    """The last inputs of the convolution for the channels `c`, and its weights: [BLOCK_TAPS, c]."""
    t = tl.arange(0, BLOCK_TAPS)[:, None]
    old = tl.load(state_ptr + (read * (TAPS - 1) + t) * CHANNELS + c[None, :], mask=t < TAPS - 1, other=0.0)
    return old, tl.load(w_ptr + c[None, :] * TAPS + t, mask=t < TAPS, other=0.0).to(tl.float32)


@triton.jit
def _conv(
    x_ptr, old, w, state_ptr, s, write, c, keep, CHANNELS: tl.constexpr, TAPS: tl.constexpr, BLOCK_TAPS: tl.constexpr
):
    """One step of the convolution; where `keep`, the window moves on into the other row."""
    t = tl.arange(0, BLOCK_TAPS)[:, None]
    x = tl.where(t == TAPS - 1, tl.load(x_ptr + s * CHANNELS + c)[None, :], old)
    y = tl.sum(x.to(tl.float32) * w, 0)
    tl.store(state_ptr + (write * (TAPS - 1) + t - 1) * CHANNELS + c[None, :], x, mask=(t > 0) & (t < TAPS) & keep)
    return y * tl.sigmoid(y)


@triton.jit
def delta_step(
    causal_conv_x,  # input, bf16 [num_tokens, 1536]
    causal_conv_cu_seqlens,  # input, i32 [num_seqs+1]
    causal_conv_read_rows,  # input, i32 [num_seqs]
    causal_conv_write_rows,  # input, i32 [num_seqs]
    delta_gates_b,  # input, bf16 [num_tokens, 8]
    delta_gates_a,  # input, bf16 [num_tokens, 8]
    gated_norm_z,  # input, bf16 [num_tokens, 1024]
    causal_conv_w,  # weight, bf16 [1536, 1, 4]
    delta_gates_a_log,  # weight, fp32 [8]
    delta_gates_dt_bias,  # weight, fp32 [8]
    gated_norm_w,  # weight, fp32 [128]
    causal_conv_conv_state,  # state, bf16 [13, 3, 1536]
    delta_rule_ssm_state,  # state, fp32 [13, 8, 128, 128]
    gated_norm_y,  # output, bf16 [num_tokens, 1024]
    partial,  # scratch, fp32 [num_seqs, 1024]
    tickets,  # scratch, i32 [num_seqs, 8]
    num_tokens,
    num_seqs,
):
    A: tl.constexpr = 2
    B: tl.constexpr = 8
    BLOCK_TAPS: tl.constexpr = 4
    BLOCK_V: tl.constexpr = 16
    CHANNELS: tl.constexpr = 1536
    DK: tl.constexpr = 128
    DV: tl.constexpr = 128
    EPS: tl.constexpr = 1e-06
    GROUP: tl.constexpr = 4
    L2_EPS: tl.constexpr = 1e-06
    SCALE: tl.constexpr = 0.08838834764831845
    TAPS: tl.constexpr = 4
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may take its place on the machine
    s, head, column = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    key_head = head // GROUP
    i = tl.arange(0, DK)
    j = column * BLOCK_V + tl.arange(0, BLOCK_V)
    place = i[:, None] * DV + j[None, :]
    read = tl.load(causal_conv_read_rows + s).to(tl.int64)
    write = tl.load(causal_conv_write_rows + s).to(tl.int64)
    state = tl.load(delta_rule_ssm_state + (read * B + head) * DK * DV + place)
    q_old, q_w = _window(causal_conv_w, causal_conv_conv_state, read, key_head * DK + i, CHANNELS, TAPS, BLOCK_TAPS)
    k_old, k_w = _window(causal_conv_w, causal_conv_conv_state, read, (A + key_head) * DK + i, CHANNELS, TAPS, BLOCK_TAPS)
    v_old, v_w = _window(causal_conv_w, causal_conv_conv_state, read, 2 * A * DK + head * DV + j, CHANNELS, TAPS, BLOCK_TAPS)
    rate = -tl.exp(tl.load(delta_gates_a_log + head))
    bias = tl.load(delta_gates_dt_bias + head)
    scale = tl.load(gated_norm_w + tl.arange(0, DV))

    tl.extra.cuda.gdc_wait()  # all before this one is done and visible

    b = tl.load(delta_gates_b + s * B + head).to(tl.float32)
    a = tl.load(delta_gates_a + s * B + head).to(tl.float32)
    row = (s * B + head) * DV
    z = tl.load(gated_norm_z + row + tl.arange(0, DV)).to(tl.float32)
    leads = (head % GROUP == 0) & (column == 0)  # one of the programs that share a key head keeps its window
    q = _conv(causal_conv_x, q_old, q_w, causal_conv_conv_state, s, write, key_head * DK + i, leads, CHANNELS, TAPS, BLOCK_TAPS)
    k = _conv(causal_conv_x, k_old, k_w, causal_conv_conv_state, s, write, (A + key_head) * DK + i, leads, CHANNELS, TAPS, BLOCK_TAPS)
    v = _conv(causal_conv_x, v_old, v_w, causal_conv_conv_state, s, write, 2 * A * DK + head * DV + j, True, CHANNELS, TAPS, BLOCK_TAPS)
    q *= tl.rsqrt(tl.sum(q * q, 0) + L2_EPS) * SCALE
    k *= tl.rsqrt(tl.sum(k * k, 0) + L2_EPS)
    softplus = tl.maximum(a + bias, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(a + bias)))
    state *= tl.exp(rate * softplus)
    change = tl.sigmoid(b) * (v - tl.sum(state * k[:, None], 0))
    state += k[:, None] * change[None, :]
    part = tl.sum(state * q[:, None], 0)
    to_state = delta_rule_ssm_state + (write * B + head) * DK * DV
    tl.store(partial + row + j, part)
    tl.debug_barrier()
    ticket = tl.atomic_add(tickets + s * B + head, 1, sem="acq_rel")
    tl.store(to_state + place, state)
    if ticket < DV // BLOCK_V - 1:
        return
    tl.store(tickets + s * B + head, 0)  # for the next launch; all columns of the head are there: now its norm
    j = tl.arange(0, DV)
    y = tl.load(partial + row + j, cache_modifier=".cg")
    y *= tl.rsqrt(tl.sum(y * y, 0) / DV + EPS) * scale * z * tl.sigmoid(z)
    tl.store(gated_norm_y + row + tl.arange(0, DV), y)
