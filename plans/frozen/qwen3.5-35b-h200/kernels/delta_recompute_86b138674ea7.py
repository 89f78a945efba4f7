"""delta_recompute

recompute_state: the states of src_state_slots, after the first context_lens - R - state_lens inputs kept there, go to dst_state_slots; x, b and a are kept there
causal_conv: y[t] = silu(sum_j w[j] x[t - K + 1 + j])
qk_l2_norm: q = q / |q| / sqrt(key_dim), k = k / |k|, v as it is
delta_gates: sigmoid(b), -exp(a_log) softplus(a + dt_bias)
delta_rule: S = e^g S; S += k (beta (v - S^T k))^T; y = S^T q
gated_norm: y = x / sqrt(mean(x^2) + eps) * w * silu(z), per head
Source: Gated DeltaNet (arXiv:2412.06464), its few rows as one chunk (arXiv:2406.06484)
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
def _followed(inputs, x_ptr, begin, c, count, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    """The inputs, and those of the rows after them, of which `count` are there."""
    for i in tl.static_range(ROWS):
        inputs = inputs + (tl.load(x_ptr + (begin + i) * CHANNELS + c, mask=i < count, other=0.0),)
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
def _gates(b_ptr, a_ptr, rate, bias, begin, head, count, B: tl.constexpr, ROWS: tl.constexpr):
    """(logarithm of the decay, beta) of each row; a row that is not there changes nothing."""
    gates = ()
    for i in tl.static_range(ROWS):
        x = tl.load(a_ptr + (begin + i) * B + head, mask=i < count, other=0.0).to(tl.float32) + bias
        softplus = tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))
        beta = tl.sigmoid(tl.load(b_ptr + (begin + i) * B + head, mask=i < count, other=0.0).to(tl.float32))
        gates = gates + ((tl.where(i < count, rate * softplus, 0.0), tl.where(i < count, beta, 0.0)),)
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
def _rows(inputs, taps, TAPS: tl.constexpr, COUNT: tl.constexpr):
    """Rows of the convolution."""
    rows = ()
    for i in tl.static_range(COUNT):
        rows = rows + (_conv(inputs, taps, i, TAPS),)
    return rows


@triton.jit
def _units(rows, factor, COUNT: tl.constexpr, L2_EPS: tl.constexpr):
    """Rows of a length, that of `factor`."""
    units = ()
    for i in tl.static_range(COUNT):
        units = units + (rows[i] * (tl.rsqrt(tl.sum(rows[i] * rows[i], 0) + L2_EPS) * factor),)
    return units


@triton.jit
def _logs(gates, COUNT: tl.constexpr):
    """How far the state has decayed after each row, as a logarithm."""
    logs, log = (), 0.0
    for i in tl.static_range(COUNT):
        log += gates[i][0]
        logs = logs + (log,)
    return logs


@triton.jit
def _changes(state, k, v, gates, logs, COUNT: tl.constexpr):
    """u of each row: it adds k u^T to the state, u = beta (v - S^T k), and S is the state before and what came since."""
    seen, changes = (), ()
    for i in tl.static_range(COUNT):
        seen = seen + (tl.sum(state * k[i][:, None], 0),)
    for i in tl.static_range(COUNT):
        u = v[i] - tl.exp(logs[i]) * seen[i]
        for l in tl.static_range(i):
            u -= tl.exp(logs[i] - logs[l]) * tl.sum(k[i] * k[l], 0) * changes[l]
        changes = changes + (gates[i][1] * u,)
    return changes


@triton.jit
def delta_recompute(
    recompute_state_x,  # input, bf16 [num_tokens, 8192]
    recompute_state_b,  # input, bf16 [num_tokens, 32]
    recompute_state_a,  # input, bf16 [num_tokens, 32]
    recompute_state_context_lens,  # input, i32 [num_seqs]
    recompute_state_state_lens,  # input, i32 [num_seqs]
    recompute_state_src_state_slots,  # input, i32 [num_seqs]
    recompute_state_dst_state_slots,  # input, i32 [num_seqs]
    causal_conv_cu_seqlens,  # input, i32 [num_seqs+1]
    gated_norm_z,  # input, bf16 [num_tokens, 4096]
    recompute_state_w,  # weight, bf16 [8192, 1, 4]
    recompute_state_a_log,  # weight, fp32 [32]
    recompute_state_dt_bias,  # weight, fp32 [32]
    gated_norm_w,  # weight, fp32 [128]
    recompute_state_conv_state,  # state, bf16 [46, 3, 8192]
    recompute_state_ssm_state,  # state, fp32 [46, 32, 128, 128]
    recompute_state_kept_inputs,  # state, bf16 [46, 4, 8192]
    recompute_state_kept_gates,  # state, bf16 [46, 2, 4, 32]
    gated_norm_y,  # output, bf16 [num_tokens, 4096]
    partial,  # scratch, fp32 [num_seqs, 16384]
    counters,  # scratch, i32 [num_seqs, 32]
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
    KEPT: tl.constexpr = 4
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
    read = tl.load(recompute_state_src_state_slots + s).to(tl.int64)
    write = tl.load(recompute_state_dst_state_slots + s).to(tl.int64)
    pending = tl.load(recompute_state_context_lens + s) - ROWS - tl.load(recompute_state_state_lens + s)
    state = tl.load(recompute_state_ssm_state + (read * B + head) * DK * DV + place)
    q_in = _kept(recompute_state_conv_state, read, q_c, CHANNELS, TAPS)
    q_in = _followed(q_in, recompute_state_kept_inputs, read * KEPT, q_c, pending, CHANNELS, KEPT)
    q_taps = _taps(recompute_state_w, q_c, TAPS)
    k_in = _kept(recompute_state_conv_state, read, k_c, CHANNELS, TAPS)
    k_in = _followed(k_in, recompute_state_kept_inputs, read * KEPT, k_c, pending, CHANNELS, KEPT)
    k_taps = _taps(recompute_state_w, k_c, TAPS)
    v_in = _kept(recompute_state_conv_state, read, v_c, CHANNELS, TAPS)
    v_in = _followed(v_in, recompute_state_kept_inputs, read * KEPT, v_c, pending, CHANNELS, KEPT)
    v_taps = _taps(recompute_state_w, v_c, TAPS)
    rate = -tl.exp(tl.load(recompute_state_a_log + head))
    bias = tl.load(recompute_state_dt_bias + head)
    kept_b = recompute_state_kept_gates + read * 2 * KEPT * B
    gates = _gates(kept_b, kept_b + KEPT * B, rate, bias, 0, head, pending, B, KEPT)
    d = tl.arange(0, DV)
    scale = tl.load(gated_norm_w + d)
    k = _units(_rows(k_in, k_taps, TAPS, KEPT), 1.0, KEPT, L2_EPS)
    logs = _logs(gates, KEPT)
    changes = _changes(state, k, _rows(v_in, v_taps, TAPS, KEPT), gates, logs, KEPT)
    state *= tl.exp(logs[KEPT - 1])
    for i in tl.static_range(KEPT):
        state += k[i][:, None] * (tl.exp(logs[KEPT - 1] - logs[i]) * changes[i])[None, :]
    tl.store(recompute_state_ssm_state + (write * B + head) * DK * DV + place, state)
    leads = (head % GROUP == 0) & (column == 0)  # one of the programs that share a key head keeps its inputs
    q_in = _newest(q_in, pending, TAPS, KEPT)
    k_in = _newest(k_in, pending, TAPS, KEPT)
    v_in = _newest(v_in, pending, TAPS, KEPT)
    _keep(v_in, recompute_state_conv_state, write, -1, v_c, CHANNELS, TAPS)
    if leads:
        _keep(q_in, recompute_state_conv_state, write, -1, q_c, CHANNELS, TAPS)
        _keep(k_in, recompute_state_conv_state, write, -1, k_c, CHANNELS, TAPS)

    tl.extra.cuda.gdc_wait()  # all before this one is done and visible

    begin = s * ROWS
    q_in = _followed(q_in, recompute_state_x, begin, q_c, ROWS, CHANNELS, ROWS)
    k_in = _followed(k_in, recompute_state_x, begin, k_c, ROWS, CHANNELS, ROWS)
    v_in = _followed(v_in, recompute_state_x, begin, v_c, ROWS, CHANNELS, ROWS)
    gates = _gates(recompute_state_b, recompute_state_a, rate, bias, begin, head, ROWS, B, ROWS)
    r = tl.arange(0, BLOCK_R)
    ok = (r < ROWS)[:, None]
    rows = ((begin + r) * B + head)[:, None] * DV + d[None, :]
    z = tl.load(gated_norm_z + rows, mask=ok, other=0.0).to(tl.float32)
    q = _units(_rows(q_in, q_taps, TAPS, ROWS), SCALE, ROWS, L2_EPS)
    k = _units(_rows(k_in, k_taps, TAPS, ROWS), 1.0, ROWS, L2_EPS)
    logs = _logs(gates, ROWS)
    changes = _changes(state, k, _rows(v_in, v_taps, TAPS, ROWS), gates, logs, ROWS)
    for i in tl.static_range(ROWS):
        part = tl.exp(logs[i]) * tl.sum(state * q[i][:, None], 0)
        for l in tl.static_range(i + 1):
            part += tl.exp(logs[i] - logs[l]) * tl.sum(q[i] * k[l], 0) * changes[l]
        tl.store(partial + ((begin + i) * B + head) * DV + j, part)
    tl.debug_barrier()
    counter = tl.atomic_add(counters + s * B + head, 1, sem="acq_rel")
    for i in tl.static_range(ROWS):  # nobody waits for what is kept
        tl.store(recompute_state_kept_inputs + (write * KEPT + i) * CHANNELS + v_c, v_in[TAPS - 1 + i])
        if leads:
            tl.store(recompute_state_kept_inputs + (write * KEPT + i) * CHANNELS + q_c, q_in[TAPS - 1 + i])
            tl.store(recompute_state_kept_inputs + (write * KEPT + i) * CHANNELS + k_c, k_in[TAPS - 1 + i])
    if column == 0:
        kept = recompute_state_kept_gates + (write * 2 * KEPT + r) * B + head
        mine = (begin + r) * B + head
        tl.store(kept, tl.load(recompute_state_b + mine, mask=r < ROWS), mask=r < ROWS)
        tl.store(kept + KEPT * B, tl.load(recompute_state_a + mine, mask=r < ROWS), mask=r < ROWS)
    if counter < DV // BLOCK_V - 1:
        return
    tl.store(counters + s * B + head, 0)  # for the next launch; all columns of the head are there: now its norm
    y = tl.load(partial + rows, mask=ok, other=0.0, cache_modifier=".cg")
    y *= tl.rsqrt(tl.sum(y * y, 1) / DV + EPS)[:, None] * scale[None, :] * z * tl.sigmoid(z)
    tl.store(gated_norm_y + rows, y, mask=ok)
