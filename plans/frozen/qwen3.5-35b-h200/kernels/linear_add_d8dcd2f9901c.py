"""linear_add

linear: y = x w^T, cut into `splits` columns
add: y = x + r
Source: a product that reads each weight once
"""

import triton
import triton.language as tl


@triton.jit
def linear_add(
    linear_x,  # input, bf16 [num_seqs, 4096]
    add_r,  # input, bf16 [num_seqs, 2048]
    linear_w,  # weight, bf16 [2048, 4096]
    add_y,  # output, bf16 [num_seqs, 2048]
    num_tokens,
    num_seqs,
):
    BLOCK_K: tl.constexpr = 512
    BLOCK_M: tl.constexpr = 4
    BLOCK_N: tl.constexpr = 4
    K: tl.constexpr = 4096
    N: tl.constexpr = 2048
    STAGES: tl.constexpr = 2
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may take its place on the machine
    n = tl.arange(0, BLOCK_N)  # columns of this program, from its first
    first = tl.program_id(0) * BLOCK_N
    n_ok = first + n < N
    weight = linear_w + first.to(tl.int64) * K

    k = tl.arange(0, BLOCK_K)
    prefetched = tl.load(weight + n[None, :, None] * K + k[None, None, :], mask=n_ok[None, :, None], other=0.0)
    tl.extra.cuda.gdc_wait()  # all before this one is done and visible

    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = m < num_seqs
    row = m
    acc = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], tl.float32)
    a = tl.load(linear_x + row[:, None, None] * K + k[None, None, :], mask=m_ok[:, None, None], other=0.0).to(tl.float32)
    acc += prefetched.to(tl.float32) * a

    for k0 in tl.range(BLOCK_K, K, BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(linear_x + row[:, None, None] * K + k[None, None, :], mask=m_ok[:, None, None], other=0.0).to(tl.float32)
        acc += tl.load(weight + n[None, :, None] * K + k[None, None, :], mask=n_ok[None, :, None], other=0.0).to(tl.float32) * a

    out = tl.sum(acc, 2)
    col = first + n
    ok = m_ok[:, None] & n_ok[None, :]
    place = m[:, None] * N + col[None, :]
    out += tl.load(add_r + place, mask=ok, other=0.0).to(tl.float32)
    tl.store(add_y + place, out, mask=ok)
