"""gates_delta_chunk

delta_gates: beta = sigmoid(b); log_decay = -exp(a_log) softplus(a + dt_bias)
delta_chunk: per chunk of 64 tokens: A = I + strict_lower(beta K K^T * D); u = A^-1 beta V; w = A^-1
beta e^G K; mix = (Q K^T) * D; total = G
Source: the chunked delta rule in its WY form (arXiv:2406.06484, gated: arXiv:2412.06464)

Grid: (chunk, value head, sequence). One program computes what a chunk of one head needs besides the
state: decays (total), w and u of the WY form, and the products of queries and keys (mix).
A key heads of DK, B value heads of DV, GROUP = B / A, CHUNK tokens a chunk; `t` and `c` count
tokens, `i` and `j` dimensions of key and value. BLOCK: size of the diagonal blocks of the inverse.
"""

import triton
import triton.language as tl


@triton.jit
def gates_delta_chunk(
    delta_gates_b,  # input, bf16 [num_tokens, 8]
    delta_gates_a,  # input, bf16 [num_tokens, 8]
    delta_chunk_q,  # input, bf16 [num_tokens, 256]
    delta_chunk_k,  # input, bf16 [num_tokens, 256]
    delta_chunk_v,  # input, bf16 [num_tokens, 1024]
    delta_chunk_cu_seqlens,  # input, i32 [num_seqs+1]
    delta_gates_a_log,  # weight, fp32 [8]
    delta_gates_dt_bias,  # weight, fp32 [8]
    delta_chunk_u,  # output, bf16 [num_tokens, 1024]
    delta_chunk_w,  # output, bf16 [num_tokens, 1024]
    delta_chunk_mix,  # output, bf16 [num_tokens, 512]
    delta_chunk_total,  # output, fp32 [num_tokens, 8]
    num_tokens,  # i32
    num_seqs,  # i32
):
    A: tl.constexpr = 2
    B: tl.constexpr = 8
    BLOCK: tl.constexpr = 16
    CHUNK: tl.constexpr = 64
    DK: tl.constexpr = 128
    DV: tl.constexpr = 128
    GROUP: tl.constexpr = 4
    PRECISION: tl.constexpr = 'tf32'

    chunk, head, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(delta_chunk_cu_seqlens + s)
    count = tl.load(delta_chunk_cu_seqlens + s + 1) - begin
    if chunk * CHUNK >= count:
        return
    c = tl.arange(0, CHUNK)
    ok = chunk * CHUNK + c < count
    t = begin + chunk * CHUNK + c
    i = tl.arange(0, DK)
    j = tl.arange(0, DV)
    beta = tl.sigmoid(tl.load(delta_gates_b + t * B + head, mask=ok, other=0.0).to(tl.float32))
    step = tl.load(delta_gates_a + t * B + head, mask=ok, other=0.0).to(tl.float32) + tl.load(
        delta_gates_dt_bias + head
    )
    softplus = tl.maximum(step, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(step)))
    total = tl.cumsum(
        tl.where(ok, -tl.exp(tl.load(delta_gates_a_log + head)) * softplus, 0.0), 0
    )
    tl.store(delta_chunk_total + t * B + head, total, mask=ok)
    key_offsets = (t * A + head // GROUP)[:, None] * DK + i[None, :]
    key = tl.load(delta_chunk_k + key_offsets, mask=ok[:, None], other=0.0)
    query = tl.load(delta_chunk_q + key_offsets, mask=ok[:, None], other=0.0)
    mix = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    mix *= tl.exp(
        tl.where(c[:, None] >= c[None, :], total[:, None] - total[None, :], float("-inf"))
    )
    tl.store(
        delta_chunk_mix + (t * B + head)[:, None] * CHUNK + c[None, :], mix, mask=ok[:, None]
    )
    wide_key = key.to(tl.float32)
    # A = I + L with L strictly lower triangular. The blocks on the diagonal are inverted row by
    # row, all blocks at once. With D their inverse and N = D (A - blocks), whose fourth power is 0,
    # A^-1 = (I - N) (I + N^2) D.
    gap = tl.where(c[:, None] > c[None, :], total[:, None] - total[None, :], float("-inf"))
    lower = tl.dot(
        (wide_key * beta[:, None]).to(tl.bfloat16), tl.trans(key), input_precision=PRECISION
    ) * tl.exp(gap)
    b = tl.arange(0, CHUNK // BLOCK)
    e = tl.arange(0, BLOCK)
    same = (b[:, None] == b[None, :])[:, None, :, None]
    blocks = tl.reshape(lower, [CHUNK // BLOCK, BLOCK, CHUNK // BLOCK, BLOCK])
    inverse = -tl.sum(tl.where(same, blocks, 0.0), 2)
    for r in range(2, BLOCK):
        this = (e == r)[None, :, None]
        row = tl.sum(tl.where(this, inverse, 0.0), 1)
        row += tl.sum(row[:, :, None] * inverse, 1)
        inverse = tl.where(this, row[:, None, :], inverse)
    inverse += tl.where(e[:, None] == e[None, :], 1.0, 0.0)[None, :, :]
    inverse = tl.reshape(tl.where(same, inverse[:, :, None, :], 0.0), [CHUNK, CHUNK])
    rest = tl.where((c // BLOCK)[:, None] > (c // BLOCK)[None, :], lower, 0.0)
    turn = tl.dot(inverse, rest, input_precision=PRECISION)
    inverse += tl.dot(
        tl.dot(turn, turn, input_precision=PRECISION), inverse, input_precision=PRECISION
    )
    inverse -= tl.dot(turn, inverse, input_precision=PRECISION)
    solve = inverse.to(tl.bfloat16)
    w = tl.dot(
        solve,
        (wide_key * (beta * tl.exp(total))[:, None]).to(tl.bfloat16),
        input_precision=PRECISION,
    )
    tl.store(delta_chunk_w + (t * B + head)[:, None] * DK + i[None, :], w, mask=ok[:, None])
    value_offsets = (t * B + head)[:, None] * DV + j[None, :]
    value = tl.load(delta_chunk_v + value_offsets, mask=ok[:, None], other=0.0).to(tl.float32)
    u = tl.dot(solve, (value * beta[:, None]).to(tl.bfloat16), input_precision=PRECISION)
    tl.store(delta_chunk_u + value_offsets, u, mask=ok[:, None])
