"""delta_replay

replay: the states of read_rows, after the first context_lens - R - state_lens inputs kept there, go to write_rows; x, b and a are kept there
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
def _newest(inputs, pending, TAPS: tl.constexpr, KEPT: tl.constexpr):
    """The last inputs before the new rows: after the window come those that were kept, of which `pending` count."""
    newest = ()
    for t in tl.static_range(TAPS - 1):
        x = inputs[t]
        for p in tl.static_range(1, KEPT + 1):
            x = tl.where(pending == p, inputs[p + t], x)
        newest = newest + (x,)
    return newest


@triton.jit
def _step(state, k, v, gates, L2_EPS: tl.constexpr):
    """The state after one row."""
    k *= tl.rsqrt(tl.sum(k * k, 0) + L2_EPS)
    state *= gates[0]
    return state + k[:, None] * (gates[1] * (v - tl.sum(state * k[:, None], 0)))[None, :]


@triton.jit
def delta_replay(
    replay_x,  # input, bf16 [num_tokens, 8192]
    replay_b,  # input, bf16 [num_tokens, 32]
    replay_a,  # input, bf16 [num_tokens, 32]
    replay_context_lens,  # input, i32 [num_seqs]
    replay_state_lens,  # input, i32 [num_seqs]
    replay_read_rows,  # input, i32 [num_seqs]
    replay_write_rows,  # input, i32 [num_seqs]
    causal_conv_cu_seqlens,  # input, i32 [num_seqs+1]
    gated_norm_z,  # input, bf16 [num_tokens, 4096]
    replay_w,  # weight, bf16 [8192, 1, 4]
    replay_a_log,  # weight, fp32 [32]
    replay_dt_bias,  # weight, fp32 [32]
    gated_norm_w,  # weight, fp32 [128]
    replay_conv_state,  # state, bf16 [46, 3, 8192]
    replay_ssm_state,  # state, fp32 [46, 32, 128, 128]
    replay_kept_inputs,  # state, bf16 [46, 5, 8192]
    replay_kept_gates,  # state, bf16 [46, 2, 5, 32]
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
    KEPT: tl.constexpr = 5
    L2_EPS: tl.constexpr = 1e-06
    ROWS: tl.constexpr = 4
    SCALE: tl.constexpr = 0.08838834764831845
    TAPS: tl.constexpr = 4
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may take its place on the machine
    s, head, column = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    key_head = head // GROUP
    i_k = tl.arange(0, DK)
    j = column * BLOCK_V + tl.arange(0, BLOCK_V)
    place = i_k[:, None] * DV + j[None, :]
    q_c, k_c, v_c = key_head * DK + i_k, (A + key_head) * DK + i_k, 2 * A * DK + head * DV + j
    read = tl.load(replay_read_rows + s).to(tl.int64)
    write = tl.load(replay_write_rows + s).to(tl.int64)
    pending = tl.load(replay_context_lens + s) - ROWS - tl.load(replay_state_lens + s)
    state = tl.load(replay_ssm_state + (read * B + head) * DK * DV + place)
    q_in = _kept(replay_conv_state, read, q_c, CHANNELS, TAPS)
    q_in = _followed(q_in, replay_kept_inputs, read * KEPT, q_c, CHANNELS, KEPT)
    q_taps = _taps(replay_w, q_c, TAPS)
    k_in = _kept(replay_conv_state, read, k_c, CHANNELS, TAPS)
    k_in = _followed(k_in, replay_kept_inputs, read * KEPT, k_c, CHANNELS, KEPT)
    k_taps = _taps(replay_w, k_c, TAPS)
    v_in = _kept(replay_conv_state, read, v_c, CHANNELS, TAPS)
    v_in = _followed(v_in, replay_kept_inputs, read * KEPT, v_c, CHANNELS, KEPT)
    v_taps = _taps(replay_w, v_c, TAPS)
    rate = -tl.exp(tl.load(replay_a_log + head))
    bias = tl.load(replay_dt_bias + head)
    kept_b = replay_kept_gates + read * 2 * KEPT * B
    gates = _gates(kept_b, kept_b + KEPT * B, rate, bias, 0, head, B, KEPT)
    d = tl.arange(0, DV)
    scale = tl.load(gated_norm_w + d)
    for i in tl.static_range(KEPT):
        if i < pending:
            state = _step(state, _conv(k_in, k_taps, i, TAPS), _conv(v_in, v_taps, i, TAPS), gates[i], L2_EPS)
    tl.store(replay_ssm_state + (write * B + head) * DK * DV + place, state)
    leads = (head % GROUP == 0) & (column == 0)  # one of the programs that share a key head keeps its inputs
    q_in = _newest(q_in, pending, TAPS, KEPT)
    k_in = _newest(k_in, pending, TAPS, KEPT)
    v_in = _newest(v_in, pending, TAPS, KEPT)
    _keep(v_in, replay_conv_state, write, -1, v_c, CHANNELS, TAPS)
    if leads:
        _keep(q_in, replay_conv_state, write, -1, q_c, CHANNELS, TAPS)
        _keep(k_in, replay_conv_state, write, -1, k_c, CHANNELS, TAPS)

    tl.extra.cuda.gdc_wait()  # all before this one is done and visible

    begin = s * ROWS
    q_in = _followed(q_in, replay_x, begin, q_c, CHANNELS, ROWS)
    k_in = _followed(k_in, replay_x, begin, k_c, CHANNELS, ROWS)
    v_in = _followed(v_in, replay_x, begin, v_c, CHANNELS, ROWS)
    gates = _gates(replay_b, replay_a, rate, bias, begin, head, B, ROWS)
    r = tl.arange(0, BLOCK_R)
    ok = (r < ROWS)[:, None]
    rows = ((begin + r) * B + head)[:, None] * DV + d[None, :]
    z = tl.load(gated_norm_z + rows, mask=ok, other=0.0).to(tl.float32)
    for i in tl.static_range(ROWS):
        q = _conv(q_in, q_taps, i, TAPS)
        q *= tl.rsqrt(tl.sum(q * q, 0) + L2_EPS) * SCALE
        state = _step(state, _conv(k_in, k_taps, i, TAPS), _conv(v_in, v_taps, i, TAPS), gates[i], L2_EPS)
        part = tl.sum(state * q[:, None], 0)
        tl.store(partial + ((begin + i) * B + head) * DV + j, part)
        tl.store(replay_kept_inputs + (write * KEPT + i) * CHANNELS + v_c, v_in[TAPS - 1 + i])
        if leads:
            tl.store(replay_kept_inputs + (write * KEPT + i) * CHANNELS + q_c, q_in[TAPS - 1 + i])
            tl.store(replay_kept_inputs + (write * KEPT + i) * CHANNELS + k_c, k_in[TAPS - 1 + i])
    if column == 0:
        kept = replay_kept_gates + (write * 2 * KEPT + r) * B + head
        mine = (begin + r) * B + head
        tl.store(kept, tl.load(replay_b + mine, mask=r < ROWS), mask=r < ROWS)
        tl.store(kept + KEPT * B, tl.load(replay_a + mine, mask=r < ROWS), mask=r < ROWS)
    tl.debug_barrier()
    if tl.atomic_add(tickets + s * B + head, 1, sem="acq_rel") < DV // BLOCK_V - 1:
        return
    tl.store(tickets + s * B + head, 0)  # for the next launch; all columns of the head are there: now its norm
    y = tl.load(partial + rows, mask=ok, other=0.0, cache_modifier=".cg")
    y *= tl.rsqrt(tl.sum(y * y, 1) / DV + EPS)[:, None] * scale[None, :] * z * tl.sigmoid(z)
    tl.store(gated_norm_y + rows, y, mask=ok)
