"""combine_linear

attention_combine: y = sum_s exp(lse_s) partial_s / sum_s exp(lse_s)
sigmoid_gate: y = x * sigmoid(g)
linear: y = x w^T, cut into `splits` columns
Source: combination of split keys (Flash-Decoding, Dao et al., 2023); a product that reads each weight once
"""

import triton
import triton.language as tl


@triton.jit
def combine_linear(
    attention_combine_partial,  # input, fp32 [num_tokens, 32768]
    attention_combine_lse,  # input, fp32 [num_tokens, 128]
    sigmoid_gate_g,  # input, bf16 [num_tokens, 1024]
    linear_w,  # weight, bf16 [4096, 1024]
    linear_y0,  # output, bf16 [num_tokens, 4096]
    num_tokens,
    num_seqs,
):
    BLOCK_K: tl.constexpr = 256
    BLOCK_N: tl.constexpr = 8
    D: tl.constexpr = 256
    K: tl.constexpr = 1024
    N: tl.constexpr = 4096
    Q: tl.constexpr = 4
    SPLITS: tl.constexpr = 32
    STAGES: tl.constexpr = 3
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may take its place on the machine
    tl.extra.cuda.gdc_wait()  # all before this one is done and visible

    m = tl.program_id(1)
    row = m
    n = tl.arange(0, BLOCK_N)  # columns of this program, from its first
    first = tl.program_id(0) * BLOCK_N
    n_ok = first + n < N
    weight = linear_w + first.to(tl.int64) * K
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)
        head = k0 // D
        top = tl.full([1], float("-inf"), tl.float32)
        for split in range(SPLITS):
            top = tl.maximum(top, tl.load(attention_combine_lse + (row * SPLITS + split) * Q + head))
        total = tl.zeros([1], tl.float32)
        a = tl.zeros([BLOCK_K], tl.float32)
        for split in range(SPLITS):
            place = (row * SPLITS + split) * Q + head
            share = tl.exp(tl.load(attention_combine_lse + place) - top)
            total += share
            a += share * tl.load(attention_combine_partial + place * D + (k % D))
        gate = tl.load(sigmoid_gate_g + row * K + k).to(tl.float32)
        a = a / total * tl.sigmoid(gate)
        acc += tl.load(weight + n[:, None] * K + k[None, :], mask=n_ok[:, None], other=0.0).to(tl.float32) * a[None, :]
    out = tl.sum(acc, 1)
    col = first + n
    ok = n_ok
    place = m * N + col
    tl.store(linear_y0 + place, out, mask=ok)
