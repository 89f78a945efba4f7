"""combine_linear_add

attention_combine: y = sum_s exp(lse_s) partial_s / sum_s exp(lse_s)
sigmoid_gate: y = x * sigmoid(g)
linear: y = x w^T, cut into `splits` columns
add: y = x + r
Source: combination of split keys (Flash-Decoding, Dao et al., 2023); a product that reads each weight once
"""

import triton
import triton.language as tl


@triton.jit
def combine_linear_add(
    attention_combine_partial,  # input, fp32 [num_tokens, 65536]
    attention_combine_lse,  # input, fp32 [num_tokens, 256]
    sigmoid_gate_g,  # input, bf16 [num_tokens, 4096]
    add_r,  # input, bf16 [num_tokens, 2048]
    linear_w,  # weight, bf16 [2048, 4096]
    add_y,  # output, bf16 [num_tokens, 2048]
    num_tokens,
    num_seqs,
):
    BLOCK_K: tl.constexpr = 256
    BLOCK_M: tl.constexpr = 16
    BLOCK_N: tl.constexpr = 16
    D: tl.constexpr = 256
    K: tl.constexpr = 4096
    N: tl.constexpr = 2048
    PRECISION: tl.constexpr = 'tf32'
    Q: tl.constexpr = 16
    SPLITS: tl.constexpr = 16
    STAGES: tl.constexpr = 4
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may take its place on the machine
    tl.extra.cuda.gdc_wait()  # all before this one is done and visible

    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = m < num_tokens
    row = m
    n = tl.arange(0, BLOCK_N)  # columns of this program, from its first
    first = tl.program_id(0) * BLOCK_N
    n_ok = first + n < N
    weight = linear_w + first.to(tl.int64) * K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)
        head = k0 // D
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        for split in range(SPLITS):
            top = tl.maximum(top, tl.load(attention_combine_lse + (row * SPLITS + split) * Q + head, mask=m_ok, other=0.0))
        total = tl.zeros([BLOCK_M], tl.float32)
        a = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for split in range(SPLITS):
            place = (row * SPLITS + split) * Q + head
            share = tl.exp(tl.load(attention_combine_lse + place, mask=m_ok, other=0.0) - top)
            total += share
            a += share[:, None] * tl.load(attention_combine_partial + place[:, None] * D + (k % D)[None, :], mask=m_ok[:, None], other=0.0)
        gate = tl.load(sigmoid_gate_g + row[:, None] * K + k[None, :], mask=m_ok[:, None], other=0.0).to(tl.float32)
        a = a / total[:, None] * tl.sigmoid(gate)
        x_tile = a.to(tl.bfloat16)
        acc = tl.dot(x_tile, tl.trans(tl.load(weight + n[:, None] * K + k[None, :], mask=n_ok[:, None], other=0.0)), acc, input_precision=PRECISION)
    out = acc
    col = first + n
    ok = m_ok[:, None] & n_ok[None, :]
    place = m[:, None] * N + col[None, :]
    out += tl.load(add_r + place, mask=ok, other=0.0).to(tl.float32)
    tl.store(add_y + place, out, mask=ok)
