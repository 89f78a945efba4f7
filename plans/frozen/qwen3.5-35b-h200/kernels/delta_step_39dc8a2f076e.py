"""delta_step

causal_conv: y[t] = silu(sum_j w[j] x[t - K + 1 + j])
qk_l2_norm: q = q / |q| / sqrt(key_dim), k = k / |k|, v as it is
delta_gates: sigmoid(b), -exp(a_log) softplus(a + dt_bias)
delta_rule: S = e^g S; S += k (beta (v - S^T k))^T; y = S^T q
gated_norm: y = x / sqrt(mean(x^2) + eps) * w * silu(z), per head
Source: Gated DeltaNet, token by token (arXiv:2412.06464): S = e^g S; S += k (beta (v - S^T k))^T; y = S^T q
"""

import triton
import triton.language as tl


@triton.jit
def _kept(state_ptr, read, c, CHANNELS: tl.constexpr, TAPS: tl.constexpr):
    """The last inputs of the convolution for the channels `c`, oldest first."""
    inputs = ()
    for t in tl.static_range(TAPS - 1):
        inputs = inputs + (tl.load(state_ptr + (read * (TAPS - 1) + t) * CHANNELS + c),)
    return inputs


@triton.jit
def _taps(w_ptr, c, TAPS: tl.constexpr):
    taps = ()
    for t in tl.static_range(TAPS):
        taps = taps + (tl.load(w_ptr + c * TAPS + t).to(tl.float32),)
    return taps


@triton.jit
def _followed(inputs, x_ptr, begin, c, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    """The inputs, and those of all rows after them."""
    for i in tl.static_range(ROWS):
        inputs = inputs + (tl.load(x_ptr + (begin + i) * CHANNELS + c),)
    return inputs


@triton.jit
def _conv(inputs, taps, i: tl.constexpr, TAPS: tl.constexpr):
    """Row `i` of the convolution."""
    y = inputs[i].to(tl.float32) * taps[0]
    for t in tl.static_range(1, TAPS):
        y += inputs[i + t].to(tl.float32) * taps[t]
    return y * tl.sigmoid(y)


@triton.jit
def _keep(inputs, state_ptr, write, i: tl.constexpr, c, CHANNELS: tl.constexpr, TAPS: tl.constexpr):
    """The last inputs after row `i`, for the step that goes on from there."""
    for t in tl.static_range(TAPS - 1):
        tl.store(state_ptr + (write * (TAPS - 1) + t) * CHANNELS + c, inputs[i + 1 + t])


@triton.jit
def _gates(b_ptr, a_ptr, rate, bias, begin, head, B: tl.constexpr, ROWS: tl.constexpr):
    """(decay, beta) of each row."""
    gates = ()
    for i in tl.static_range(ROWS):
        x = tl.load(a_ptr + (begin + i) * B + head).to(tl.float32) + bias
        softplus = tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))
        beta = tl.sigmoid(tl.load(b_ptr + (begin + i) * B + head).to(tl.float32))
        gates = gates + ((tl.exp(rate * softplus), beta),)
    return gates


@triton.jit
def _rows(table_ptr, s, WRITE_ROWS: tl.constexpr, ROWS: tl.constexpr):
    """The row of state to write after each row."""
    rows = ()
    for i in tl.static_range(ROWS):
        rows = rows + (tl.load(table_ptr + s * WRITE_ROWS + i).to(tl.int64),)
    return rows


@triton.jit
def delta_step(
    causal_conv_x,  # input, bf16 [num_tokens, 8192]
    causal_conv_cu_seqlens,  # input, i32 [num_seqs+1]
    causal_conv_read_rows,  # input, i32 [num_seqs]
    causal_conv_write_rows,  # input, i32 [num_seqs, 4]
    delta_gates_b,  # input, bf16 [num_tokens, 32]
    delta_gates_a,  # input, bf16 [num_tokens, 32]
    gated_norm_z,  # input, bf16 [num_tokens, 4096]
    causal_conv_w,  # weight, bf16 [8192, 1, 4]
    delta_gates_a_log,  # weight, fp32 [32]
    delta_gates_dt_bias,  # weight, fp32 [32]
    gated_norm_w,  # weight, fp32 [128]
    causal_conv_conv_state,  # state, bf16 [58, 3, 8192]
    delta_rule_ssm_state,  # state, fp32 [58, 32, 128, 128]
    gated_norm_y,  # output, bf16 [num_tokens, 4096]
    partial,  # scratch, fp32 [num_seqs, 16384]
    tickets,  # scratch, i32 [num_seqs, 32]
    num_tokens,
    num_seqs,
):
    A: tl.constexpr = 16
    B: tl.constexpr = 32
    BLOCK_R: tl.constexpr = 4
    BLOCK_V: tl.constexpr = 16
    CHANNELS: tl.constexpr = 8192
    DK: tl.constexpr = 128
    DV: tl.constexpr = 128
    EPS: tl.constexpr = 1e-06
    GROUP: tl.constexpr = 2
    L2_EPS: tl.constexpr = 1e-06
    ROWS: tl.constexpr = 4
    SCALE: tl.constexpr = 0.08838834764831845
    TAPS: tl.constexpr = 4
    WRITE_ROWS: tl.constexpr = 4
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may take its place on the machine
    s, head, column = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    key_head = head // GROUP
    i_k = tl.arange(0, DK)
    j = column * BLOCK_V + tl.arange(0, BLOCK_V)
    place = i_k[:, None] * DV + j[None, :]
    q_c, k_c, v_c = key_head * DK + i_k, (A + key_head) * DK + i_k, 2 * A * DK + head * DV + j
    read = tl.load(causal_conv_read_rows + s).to(tl.int64)
    writes = _rows(causal_conv_write_rows, s, WRITE_ROWS, ROWS)
    state = tl.load(delta_rule_ssm_state + (read * B + head) * DK * DV + place)
    q_in = _kept(causal_conv_conv_state, read, q_c, CHANNELS, TAPS)
    q_taps = _taps(causal_conv_w, q_c, TAPS)
    k_in = _kept(causal_conv_conv_state, read, k_c, CHANNELS, TAPS)
    k_taps = _taps(causal_conv_w, k_c, TAPS)
    v_in = _kept(causal_conv_conv_state, read, v_c, CHANNELS, TAPS)
    v_taps = _taps(causal_conv_w, v_c, TAPS)
    rate = -tl.exp(tl.load(delta_gates_a_log + head))
    bias = tl.load(delta_gates_dt_bias + head)
    d = tl.arange(0, DV)
    scale = tl.load(gated_norm_w + d)

    tl.extra.cuda.gdc_wait()  # all before this one is done and visible

    begin = s * ROWS
    q_in = _followed(q_in, causal_conv_x, begin, q_c, CHANNELS, ROWS)
    k_in = _followed(k_in, causal_conv_x, begin, k_c, CHANNELS, ROWS)
    v_in = _followed(v_in, causal_conv_x, begin, v_c, CHANNELS, ROWS)
    gates = _gates(delta_gates_b, delta_gates_a, rate, bias, begin, head, B, ROWS)
    r = tl.arange(0, BLOCK_R)
    ok = (r < ROWS)[:, None]
    rows = ((begin + r) * B + head)[:, None] * DV + d[None, :]
    z = tl.load(gated_norm_z + rows, mask=ok, other=0.0).to(tl.float32)
    leads = (head % GROUP == 0) & (column == 0)  # one of the programs that share a key head keeps its inputs
    for i in tl.static_range(ROWS):
        q = _conv(q_in, q_taps, i, TAPS)
        k = _conv(k_in, k_taps, i, TAPS)
        v = _conv(v_in, v_taps, i, TAPS)
        q *= tl.rsqrt(tl.sum(q * q, 0) + L2_EPS) * SCALE
        k *= tl.rsqrt(tl.sum(k * k, 0) + L2_EPS)
        state *= gates[i][0]
        change = gates[i][1] * (v - tl.sum(state * k[:, None], 0))
        state += k[:, None] * change[None, :]
        part = tl.sum(state * q[:, None], 0)
        tl.store(partial + ((begin + i) * B + head) * DV + j, part)
        tl.store(delta_rule_ssm_state + (writes[i] * B + head) * DK * DV + place, state)
        _keep(v_in, causal_conv_conv_state, writes[i], i, v_c, CHANNELS, TAPS)
        if leads:
            _keep(q_in, causal_conv_conv_state, writes[i], i, q_c, CHANNELS, TAPS)
            _keep(k_in, causal_conv_conv_state, writes[i], i, k_c, CHANNELS, TAPS)
    tl.debug_barrier()
    if tl.atomic_add(tickets + s * B + head, 1, sem="acq_rel") < DV // BLOCK_V - 1:
        return
    tl.store(tickets + s * B + head, 0)  # for the next launch; all columns of the head are there: now its norm
    y = tl.load(partial + rows, mask=ok, other=0.0, cache_modifier=".cg")
    y *= tl.rsqrt(tl.sum(y * y, 1) / DV + EPS)[:, None] * scale[None, :] * z * tl.sigmoid(z)
    tl.store(gated_norm_y + rows, y, mask=ok)
