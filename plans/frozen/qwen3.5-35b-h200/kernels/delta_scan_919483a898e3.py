"""delta_scan

delta_scan: U = u - w S; y = e^G Q S + mix U; S = e^G_last S + (e^(G_last - G) K)^T U
Source: the chunked delta rule in its WY form (arXiv:2406.06484, gated: arXiv:2412.06464)

Grid: (block of columns, value head, sequence). One program takes BLOCK_V columns of one head's
state [DK, DV] through all chunks of one sequence.
A key heads of DK, B value heads of DV, GROUP = B / A, CHUNK tokens a chunk; `t` and `c` count
tokens, `i` and `j` rows and columns of the state.
"""

import triton
import triton.language as tl


@triton.jit
def delta_scan(
    q,  # input, bf16 [num_tokens, 2048]
    k,  # input, bf16 [num_tokens, 2048]
    u,  # input, bf16 [num_tokens, 4096]
    w,  # input, bf16 [num_tokens, 4096]
    mix,  # input, bf16 [num_tokens, 2048]
    total,  # input, fp32 [num_tokens, 32]
    cu_seqlens,  # input, i32 [num_seqs+1]
    src_state_slots,  # input, i32 [num_seqs]
    dst_state_slots,  # input, i32 [num_seqs]
    ssm_state,  # state, fp32 [30, 32, 128, 128]
    y,  # output, bf16 [num_tokens, 4096]
    num_tokens,  # i32
    num_seqs,  # i32
):
    A: tl.constexpr = 16
    B: tl.constexpr = 32
    BLOCK_V: tl.constexpr = 32
    CHUNK: tl.constexpr = 64
    DK: tl.constexpr = 128
    DV: tl.constexpr = 128
    GROUP: tl.constexpr = 2
    PRECISION: tl.constexpr = 'tf32'
    STAGES: tl.constexpr = 3

    column, head, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(cu_seqlens + s)
    end = tl.load(cu_seqlens + s + 1)
    src = tl.load(src_state_slots + s).to(tl.int64)
    dst = tl.load(dst_state_slots + s).to(tl.int64)
    c = tl.arange(0, CHUNK)
    i = tl.arange(0, DK)
    j = column * BLOCK_V + tl.arange(0, BLOCK_V)
    state_offsets = i[:, None] * DV + j[None, :]
    state = tl.load(ssm_state + (src * B + head) * DK * DV + state_offsets).to(tl.float32)
    # The decay of a whole chunk is loaded one chunk ahead, as nothing else hides its latency.
    at = tl.minimum(begin + CHUNK, end) - 1
    following = tl.load(total + at * B + head, mask=begin < end, other=0.0)
    for t0 in tl.range(begin, end, CHUNK, num_stages=STAGES):
        t = t0 + c
        ok = t < end
        key_offsets = (t * A + head // GROUP)[:, None] * DK + i[None, :]
        value_offsets = (t * B + head)[:, None] * DV + j[None, :]
        g = tl.load(total + t * B + head, mask=ok, other=0.0)
        last = following
        following = tl.load(total + (tl.minimum(t0 + 2 * CHUNK, end) - 1) * B + head)
        solved_w = tl.load(
            w + (t * B + head)[:, None] * DK + i[None, :], mask=ok[:, None], other=0.0
        )
        solved_u = tl.load(u + value_offsets, mask=ok[:, None], other=0.0).to(tl.float32)
        query = tl.load(q + key_offsets, mask=ok[:, None], other=0.0)
        key = tl.load(k + key_offsets, mask=ok[:, None], other=0.0)
        within = tl.load(
            mix + (t * B + head)[:, None] * CHUNK + c[None, :], mask=ok[:, None], other=0.0
        )
        narrow = state.to(tl.bfloat16)
        added = solved_u - tl.dot(solved_w, narrow, input_precision=PRECISION)
        out = tl.dot(query, narrow, input_precision=PRECISION) * tl.exp(g)[:, None]
        out += tl.dot(within, added.to(tl.bfloat16), input_precision=PRECISION)
        faded = (added * tl.exp(tl.where(ok, last - g, 0.0))[:, None]).to(tl.bfloat16)
        state = state * tl.exp(last) + tl.dot(tl.trans(key), faded, input_precision=PRECISION)
        tl.store(y + value_offsets, out, mask=ok[:, None])
    tl.store(ssm_state + (dst * B + head) * DK * DV + state_offsets, state)
