"""gates_delta_chunk

delta_gates: beta = sigmoid(b); log_decay = -exp(a_log) softplus(a + dt_bias)
delta_chunk: per chunk of 64 tokens: A = I + strict_lower(beta K K^T * D); u = A^-1 beta V; w = A^-1
beta e^G K; mix = (Q K^T) * D; total = G
Source: the chunked delta rule in its WY form (arXiv:2406.06484, gated: arXiv:2412.06464)

Grid: (chunk, value head, sequence). One program computes what a chunk of one head needs besides the
state: decays (total), w and u of the WY form, and the products of queries and keys (mix).
A key heads of DK, B value heads of DV, GROUP = B / A, CHUNK tokens a chunk; `t` and `c` count
tokens, `i` and `j` dimensions of key and value. LEVELS: log2(CHUNK).
"""

import triton
import triton.language as tl


@triton.jit
def gates_delta_chunk(
    delta_gates_b,  # input, bf16 [num_tokens, 32]
    delta_gates_a,  # input, bf16 [num_tokens, 32]
    delta_chunk_q,  # input, bf16 [num_tokens, 1024]
    delta_chunk_k,  # input, bf16 [num_tokens, 1024]
    delta_chunk_v,  # input, bf16 [num_tokens, 4096]
    delta_chunk_cu_seqlens,  # input, i32 [num_seqs+1]
    delta_gates_a_log,  # weight, fp32 [32]
    delta_gates_dt_bias,  # weight, fp32 [32]
    delta_chunk_u,  # output, bf16 [num_tokens, 4096]
    delta_chunk_w,  # output, bf16 [num_tokens, 4096]
    delta_chunk_mix,  # output, bf16 [num_tokens, 2048]
    delta_chunk_total,  # output, fp32 [num_tokens, 32]
    num_tokens,  # i32
    num_seqs,  # i32
):
    A: tl.constexpr = 8
    B: tl.constexpr = 32
    CHUNK: tl.constexpr = 64
    DK: tl.constexpr = 128
    DV: tl.constexpr = 128
    GROUP: tl.constexpr = 4
    LEVELS: tl.constexpr = 6
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
    # A = I + L with L strictly lower triangular. The inverses X of the blocks on the diagonal give
    # those of blocks twice as large: [[P, 0], [C, Q]] has the inverse [[P^-1, 0], [-Q^-1 C P^-1,
    # Q^-1]], which for all of them at once is X - X C X.
    gap = tl.where(c[:, None] > c[None, :], total[:, None] - total[None, :], float("-inf"))
    lower = tl.dot(key, tl.trans(key), input_precision=PRECISION) * beta[:, None] * tl.exp(gap)
    inverse = tl.where(c[:, None] == c[None, :], 1.0, 0.0)
    for level in tl.static_range(LEVELS):
        block = c >> level
        same = (block >> 1)[:, None] == (block >> 1)[None, :]
        below = tl.where(same & (block[:, None] > block[None, :]), lower, 0.0)
        if level == 0:
            inverse -= below
        else:
            turn = tl.dot(below, inverse, input_precision=PRECISION)
            inverse -= tl.dot(inverse, turn, input_precision=PRECISION)
    # The scales of keys and values are multiplied into the columns of the inverse, so that both go
    # to the products as they are.
    scale = beta * tl.exp(total)
    w = tl.dot((inverse * scale[None, :]).to(tl.bfloat16), key, input_precision=PRECISION)
    tl.store(delta_chunk_w + (t * B + head)[:, None] * DK + i[None, :], w, mask=ok[:, None])
    value_offsets = (t * B + head)[:, None] * DV + j[None, :]
    value = tl.load(delta_chunk_v + value_offsets, mask=ok[:, None], other=0.0)
    u = tl.dot((inverse * beta[None, :]).to(tl.bfloat16), value, input_precision=PRECISION)
    tl.store(delta_chunk_u + value_offsets, u, mask=ok[:, None])
