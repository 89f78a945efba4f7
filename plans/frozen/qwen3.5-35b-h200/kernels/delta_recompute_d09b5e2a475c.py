"""delta_recompute

recompute_state: n = context_lens - R - state_lens; states[dst] = states[src] after the first n
inputs kept in src; kept inputs[dst] = x, b, a
causal_conv: y[t] = silu(sum_j w[j] x[t - K + 1 + j])
qk_l2_norm: q = q / |q| / sqrt(key_dim); k = k / |k|; v = v
delta_gates: beta = sigmoid(b); log_decay = -exp(a_log) softplus(a + dt_bias)
delta_rule: g = log_decay; S = e^g S; S += k (beta (v - S^T k))^T; y = S^T q
gated_norm: y = x / sqrt(mean(x^2) + eps) * w * silu(z), per head
Source: Gated DeltaNet (arXiv:2412.06464), its few tokens as one chunk (arXiv:2406.06484)

Grid: (sequence, value head, block of columns). One program moves BLOCK_V columns of one head's
state [DK, DV] on by the kept inputs that were accepted (`pending`), writes it, and then computes
QUERY_LEN new tokens from it; the last program of a head to end does its norm.
A key heads of DK, B value heads of DV, GROUP = B / A; CHANNELS of q, k and v together, TAPS of the
convolution; `c` counts channels, `i_k` and `j` rows and columns of a state, `r` tokens of the
sequence (BLOCK_R: QUERY_LEN as a power of two). KEPT_INPUTS of a sequence at most.
"""

import triton
import triton.language as tl


@triton.jit
def _kept(state_ptr, src, c, CHANNELS: tl.constexpr, TAPS: tl.constexpr):
    """The last TAPS - 1 inputs of the convolution for the channels `c`, oldest first."""
    inputs = ()
    for t in tl.static_range(TAPS - 1):
        inputs = inputs + (tl.load(state_ptr + (src * (TAPS - 1) + t) * CHANNELS + c),)
    return inputs


@triton.jit
def _taps(w_ptr, c, TAPS: tl.constexpr):
    """The weights of the convolution for the channels `c`."""
    taps = ()
    for t in tl.static_range(TAPS):
        taps = taps + (tl.load(w_ptr + c * TAPS + t).to(tl.float32),)
    return taps


@triton.jit
def _followed(inputs, x_ptr, begin, c, count, CHANNELS: tl.constexpr, LEN: tl.constexpr):
    """The inputs, and those of the LEN tokens after them, of which `count` exist."""
    for i in tl.static_range(LEN):
        inputs = inputs + (tl.load(x_ptr + (begin + i) * CHANNELS + c, mask=i < count, other=0.0),)
    return inputs


@triton.jit
def _conv(inputs, taps, i: tl.constexpr, TAPS: tl.constexpr):
    """The convolution at token `i`, and its SiLU."""
    y = inputs[i].to(tl.float32) * taps[0]
    for t in tl.static_range(1, TAPS):
        y += inputs[i + t].to(tl.float32) * taps[t]
    return y * tl.sigmoid(y)


@triton.jit
def _keep(
    inputs, state_ptr, dst, i: tl.constexpr, c, CHANNELS: tl.constexpr, TAPS: tl.constexpr
):
    """Write the last inputs after token `i`, for a step that continues from there."""
    for t in tl.static_range(TAPS - 1):
        tl.store(state_ptr + (dst * (TAPS - 1) + t) * CHANNELS + c, inputs[i + 1 + t])


@triton.jit
def _gates(b_ptr, a_ptr, rate, bias, begin, head, count, B: tl.constexpr, LEN: tl.constexpr):
    """(logarithm of the decay, beta) of each token; one past `count` changes nothing."""
    gates = ()
    for i in tl.static_range(LEN):
        x = tl.load(a_ptr + (begin + i) * B + head, mask=i < count, other=0.0).to(tl.float32) + bias
        softplus = tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))
        beta = tl.sigmoid(
            tl.load(b_ptr + (begin + i) * B + head, mask=i < count, other=0.0).to(tl.float32)
        )
        gates = gates + (
            (tl.where(i < count, rate * softplus, 0.0), tl.where(i < count, beta, 0.0)),
        )
    return gates


@triton.jit
def _newest(inputs, pending, TAPS: tl.constexpr, KEPT_INPUTS: tl.constexpr):
    """The last inputs before the new tokens: the window, moved on by `pending` kept inputs."""
    newest = ()
    for t in tl.static_range(TAPS - 1):
        x = inputs[t]
        for p in tl.static_range(1, KEPT_INPUTS + 1):
            x = tl.where(pending == p, inputs[p + t], x)
        newest = newest + (x,)
    return newest


@triton.jit
def _conv_all(inputs, taps, TAPS: tl.constexpr, COUNT: tl.constexpr):
    """The convolution at each of COUNT tokens."""
    vectors = ()
    for i in tl.static_range(COUNT):
        vectors = vectors + (_conv(inputs, taps, i, TAPS),)
    return vectors


@triton.jit
def _units(x, factor, COUNT: tl.constexpr, L2_EPS: tl.constexpr):
    """Vectors scaled to the length `factor`."""
    units = ()
    for i in tl.static_range(COUNT):
        units = units + (x[i] * (tl.rsqrt(tl.sum(x[i] * x[i], 0) + L2_EPS) * factor),)
    return units


@triton.jit
def _logs(gates, COUNT: tl.constexpr):
    """The logarithm of the state's decay up to each token."""
    logs, log = (), 0.0
    for i in tl.static_range(COUNT):
        log += gates[i][0]
        logs = logs + (log,)
    return logs


@triton.jit
def _changes(state, k, v, gates, logs, COUNT: tl.constexpr):
    """u = beta (v - S^T k) of each token, which adds k u^T to the state S before it."""
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
    recompute_state_conv_state,  # state, bf16 [30, 3, 8192]
    recompute_state_ssm_state,  # state, fp32 [30, 32, 128, 128]
    recompute_state_kept_inputs,  # state, bf16 [30, 5, 8192]
    recompute_state_kept_gates,  # state, bf16 [30, 2, 5, 32]
    gated_norm_y,  # output, bf16 [num_tokens, 4096]
    partial,  # scratch, fp32 [num_seqs, 20480]
    counters,  # scratch, i32 [num_seqs, 32]
    num_tokens,  # i32
    num_seqs,  # i32
):
    A: tl.constexpr = 16
    B: tl.constexpr = 32
    BLOCK_R: tl.constexpr = 8
    BLOCK_V: tl.constexpr = 64
    CHANNELS: tl.constexpr = 8192
    DK: tl.constexpr = 128
    DV: tl.constexpr = 128
    EPS: tl.constexpr = 1e-06
    GROUP: tl.constexpr = 2
    KEPT_INPUTS: tl.constexpr = 5
    L2_EPS: tl.constexpr = 1e-06
    QUERY_LEN: tl.constexpr = 5
    SCALE: tl.constexpr = 0.08838834764831845
    TAPS: tl.constexpr = 4
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may start
    s, head, column = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    key_head = head // GROUP
    i_k = tl.arange(0, DK)
    j = column * BLOCK_V + tl.arange(0, BLOCK_V)
    state_offsets = i_k[:, None] * DV + j[None, :]
    q_c, k_c, v_c = key_head * DK + i_k, (A + key_head) * DK + i_k, 2 * A * DK + head * DV + j
    src = tl.load(recompute_state_src_state_slots + s).to(tl.int64)
    dst = tl.load(recompute_state_dst_state_slots + s).to(tl.int64)
    pending = (
        tl.load(recompute_state_context_lens + s)
        - QUERY_LEN
        - tl.load(recompute_state_state_lens + s)
    )
    state = tl.load(recompute_state_ssm_state + (src * B + head) * DK * DV + state_offsets).to(tl.float32)
    q_in = _kept(recompute_state_conv_state, src, q_c, CHANNELS, TAPS)
    q_in = _followed(
        q_in, recompute_state_kept_inputs, src * KEPT_INPUTS, q_c, pending, CHANNELS, KEPT_INPUTS
    )
    q_taps = _taps(recompute_state_w, q_c, TAPS)
    k_in = _kept(recompute_state_conv_state, src, k_c, CHANNELS, TAPS)
    k_in = _followed(
        k_in, recompute_state_kept_inputs, src * KEPT_INPUTS, k_c, pending, CHANNELS, KEPT_INPUTS
    )
    k_taps = _taps(recompute_state_w, k_c, TAPS)
    v_in = _kept(recompute_state_conv_state, src, v_c, CHANNELS, TAPS)
    v_in = _followed(
        v_in, recompute_state_kept_inputs, src * KEPT_INPUTS, v_c, pending, CHANNELS, KEPT_INPUTS
    )
    v_taps = _taps(recompute_state_w, v_c, TAPS)
    rate = -tl.exp(tl.load(recompute_state_a_log + head))
    bias = tl.load(recompute_state_dt_bias + head)
    kept_b = recompute_state_kept_gates + src * 2 * KEPT_INPUTS * B
    gates = _gates(
        kept_b, kept_b + KEPT_INPUTS * B, rate, bias, 0, head, pending, B, KEPT_INPUTS
    )
    d = tl.arange(0, DV)
    scale = tl.load(gated_norm_w + d)
    k = _units(_conv_all(k_in, k_taps, TAPS, KEPT_INPUTS), 1.0, KEPT_INPUTS, L2_EPS)
    logs = _logs(gates, KEPT_INPUTS)
    changes = _changes(
        state, k, _conv_all(v_in, v_taps, TAPS, KEPT_INPUTS), gates, logs, KEPT_INPUTS
    )
    state *= tl.exp(logs[KEPT_INPUTS - 1])
    for i in tl.static_range(KEPT_INPUTS):
        state += k[i][:, None] * (tl.exp(logs[KEPT_INPUTS - 1] - logs[i]) * changes[i])[None, :]
    stored = state.to(recompute_state_ssm_state.dtype.element_ty)
    tl.store(recompute_state_ssm_state + (dst * B + head) * DK * DV + state_offsets, stored)
    state = stored.to(tl.float32)  # the new tokens go on from what is kept
    # Of the programs that share a key head, one keeps its inputs.
    leads = (head % GROUP == 0) & (column == 0)
    q_in = _newest(q_in, pending, TAPS, KEPT_INPUTS)
    k_in = _newest(k_in, pending, TAPS, KEPT_INPUTS)
    v_in = _newest(v_in, pending, TAPS, KEPT_INPUTS)
    _keep(v_in, recompute_state_conv_state, dst, -1, v_c, CHANNELS, TAPS)
    if leads:
        _keep(q_in, recompute_state_conv_state, dst, -1, q_c, CHANNELS, TAPS)
        _keep(k_in, recompute_state_conv_state, dst, -1, k_c, CHANNELS, TAPS)
    tl.extra.cuda.gdc_wait()  # results of earlier kernels are visible

    begin = s * QUERY_LEN
    q_in = _followed(
        q_in, recompute_state_x, begin, q_c, QUERY_LEN, CHANNELS, QUERY_LEN
    )
    k_in = _followed(
        k_in, recompute_state_x, begin, k_c, QUERY_LEN, CHANNELS, QUERY_LEN
    )
    v_in = _followed(
        v_in, recompute_state_x, begin, v_c, QUERY_LEN, CHANNELS, QUERY_LEN
    )
    gates = _gates(
        recompute_state_b, recompute_state_a, rate, bias, begin, head, QUERY_LEN, B, QUERY_LEN
    )
    r = tl.arange(0, BLOCK_R)
    ok = (r < QUERY_LEN)[:, None]
    offsets = ((begin + r) * B + head)[:, None] * DV + d[None, :]
    z = tl.load(gated_norm_z + offsets, mask=ok, other=0.0).to(tl.float32)
    q = _units(_conv_all(q_in, q_taps, TAPS, QUERY_LEN), SCALE, QUERY_LEN, L2_EPS)
    k = _units(_conv_all(k_in, k_taps, TAPS, QUERY_LEN), 1.0, QUERY_LEN, L2_EPS)
    logs = _logs(gates, QUERY_LEN)
    changes = _changes(
        state, k, _conv_all(v_in, v_taps, TAPS, QUERY_LEN), gates, logs, QUERY_LEN
    )
    for i in tl.static_range(QUERY_LEN):
        part = tl.exp(logs[i]) * tl.sum(state * q[i][:, None], 0)
        for l in tl.static_range(i + 1):
            part += tl.exp(logs[i] - logs[l]) * tl.sum(q[i] * k[l], 0) * changes[l]
        tl.store(partial + ((begin + i) * B + head) * DV + j, part)
    tl.debug_barrier()
    counter = tl.atomic_add(counters + s * B + head, 1, sem="acq_rel")
    for i in tl.static_range(QUERY_LEN):  # no other program waits for these stores
        tl.store(
            recompute_state_kept_inputs + (dst * KEPT_INPUTS + i) * CHANNELS + v_c,
            v_in[TAPS - 1 + i],
        )
        if leads:
            tl.store(
                recompute_state_kept_inputs + (dst * KEPT_INPUTS + i) * CHANNELS + q_c,
                q_in[TAPS - 1 + i],
            )
            tl.store(
                recompute_state_kept_inputs + (dst * KEPT_INPUTS + i) * CHANNELS + k_c,
                k_in[TAPS - 1 + i],
            )
    if column == 0:
        kept = recompute_state_kept_gates + (dst * 2 * KEPT_INPUTS + r) * B + head
        mine = (begin + r) * B + head
        tl.store(
            kept, tl.load(recompute_state_b + mine, mask=r < QUERY_LEN), mask=r < QUERY_LEN
        )
        tl.store(
            kept + KEPT_INPUTS * B,
            tl.load(recompute_state_a + mine, mask=r < QUERY_LEN),
            mask=r < QUERY_LEN,
        )
    if counter < DV // BLOCK_V - 1:
        return
    tl.store(counters + s * B + head, 0)  # for the next launch
    y = tl.load(partial + offsets, mask=ok, other=0.0, cache_modifier=".cg")
    y *= tl.rsqrt(tl.sum(y * y, 1) / DV + EPS)[:, None] * scale[None, :] * z * tl.sigmoid(z)
    tl.store(gated_norm_y + offsets, y, mask=ok)
