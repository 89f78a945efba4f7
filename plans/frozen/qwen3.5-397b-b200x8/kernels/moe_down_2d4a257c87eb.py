"""moe_down

experts_down: y[t] = sum_j weights[t, j] h[t, j] D^T, D of expert ids[t, j]
linear: y = x w^T, split into columns of the sizes `splits`
gated_add: y = r + x * sigmoid(g), g one scalar for each token
Source: mixture of experts: the weighted sum of the chosen experts, and the gated shared one

Grid: (token, block of columns), tokens side by side, so that those with the same expert share its
reads. One program computes BLOCK_N columns of one token, over all its experts.
H hidden size, INNER and SHARED inner sizes of a routed and the shared expert, LOCAL experts of this
rank, TOP_K of a token; `n` counts columns,
`j` experts of the token.
Routed experts are in NVFP4; `q` counts quads, four words of 32 elements, BLOCK_Q of them at a time.
"""

import triton
import triton.language as tl


@triton.jit
def _elements(words, J: tl.constexpr):
    """Two elements of each word, of the groups J and J + 4, times 2^-14."""
    bits = words << (12 - 4 * J)
    bits = (bits & -2147450880) | ((bits >> 3) & 234884608)  # signs, and three bits below them
    low = bits.to(tl.int16).to(tl.float16, bitcast=True)
    high = (bits >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _scale(word, J: tl.constexpr):
    """The scale in byte J of a word, times 2^-8."""
    if J == 0:
        bits = word << 7
    else:
        bits = word >> (8 * J - 7)
    return (bits & 32640).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _load_quads(weight, scales, row, q, ok, K: tl.constexpr):
    """Four words of each row and each quad, [quads, rows, 4], and the two words of their scales."""
    i = tl.arange(0, 4)
    words = tl.load(
        weight + (row[None, :] * (K // 8) + q[:, None] * 4)[:, :, None] + i[None, None, :],
        mask=ok[:, :, None],
        other=0,
    )
    at = (row[None, :] * (K // 64) + q[:, None] // 4 * 2)[:, :, None]
    low_scales = tl.load(scales + at, mask=ok[:, :, None], other=0)
    high_scales = tl.load(scales + at + 1, mask=ok[:, :, None], other=0)
    return words, low_scales, high_scales


@triton.jit
def _load_x(x, words, q, K: tl.constexpr, J: tl.constexpr):
    """The four elements of group J of a row of x that meet each quad, [quads, rows, 4]."""
    i = tl.arange(0, 4)
    k = (q // 4 * 128 + q % 4 * 4 + J * 16)[:, None, None] + i[None, None, :]
    k = tl.broadcast_to(k, words.shape)  # each thread loads its own, as it has one quad
    return tl.load(x + k).to(tl.float32)


@triton.jit
def _times_x(quads, x, q, K: tl.constexpr):
    """The products of quads of some rows and x, [quads, rows, 1], times 2^-22."""
    words, low_scales, high_scales = quads
    acc = tl.zeros_like(low_scales).to(tl.float32)
    for j in tl.static_range(4):
        low, high = _elements(words, j)
        acc += tl.sum(low * _load_x(x, words, q, K, j), 2, keep_dims=True) * _scale(low_scales, j)
        acc += tl.sum(high * _load_x(x, words, q, K, j + 4), 2, keep_dims=True) * _scale(high_scales, j)
    return acc


@triton.jit
def _shared_sum(
    weight,
    row,
    ok_n,
    x,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """x times some rows of the weight of a shared expert, in blocks of FP8."""
    scales = (weight + ROWS * K).to(tl.pointer_type(tl.float32)) + row // 128 * (K // 128)
    acc = tl.zeros([BLOCK_S // 128, BLOCK_N, 128], tl.float32)
    for k0 in range(0, K, BLOCK_S):
        b = k0 // 128 + tl.arange(0, BLOCK_S // 128)
        k = (b * 128)[:, None, None] + tl.arange(0, 128)[None, None, :]
        ok = ok_n[None, :, None] & (k < K)
        w = tl.load(weight + row[None, :, None] * K + k, mask=ok, other=0.0)
        ok_b = ok_n[None, :] & (b < K // 128)[:, None]
        factor = tl.load(scales[None, :] + b[:, None], mask=ok_b, other=0.0)
        part = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        acc += w.to(tl.float16).to(tl.float32) * (part * factor[:, :, None])
    return tl.sum(tl.sum(acc, 2), 0)


@triton.jit
def _load_expert(
    w,
    expert,
    is_local,
    row,
    q,
    LOCAL: tl.constexpr,
    H: tl.constexpr,
    INNER: tl.constexpr,
):
    """Quads of some rows of an expert; zeros of one that another rank holds."""
    held = tl.where(is_local, expert, 0).to(tl.int64)
    scales = w + LOCAL * (H * (INNER // 8)) + LOCAL * H + held * (H * (INNER // 64))
    ok = (row < H)[None, :] & is_local
    return _load_quads(w + held * (H * (INNER // 8)), scales, row, q, ok, INNER)


@triton.jit
def moe_down(
    experts_down_h,  # input, bf16 [num_tokens, 1280]
    experts_down_ids,  # input, i32 [num_tokens, 10]
    experts_down_weights,  # input, bf16 [num_tokens, 10]
    linear_x,  # input, bf16 [num_tokens, 128]
    gated_add_g,  # input, bf16 [num_tokens, 1]
    experts_down_w,  # weight, fp4[1x16]:fp8:fp32 [512, 4096, 128]
    linear_w,  # weight, fp8[128x128]:fp32 [4096, 128]
    gated_add_y,  # output, bf16 [num_tokens, 4096]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK_N: tl.constexpr = 16
    BLOCK_Q: tl.constexpr = 4
    BLOCK_S: tl.constexpr = 128
    H: tl.constexpr = 4096
    INNER: tl.constexpr = 128
    LOCAL: tl.constexpr = 512
    SHARED: tl.constexpr = 128
    TOP_K: tl.constexpr = 10
    UNIT: tl.constexpr = 4194304.0
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may start
    t = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok_n = row < H
    q = tl.arange(0, BLOCK_Q)
    tl.extra.cuda.gdc_wait()  # results of earlier kernels are visible

    experts, is_local, shares = (), (), ()
    for j in tl.static_range(TOP_K):
        experts = experts + (tl.load(experts_down_ids + t * TOP_K + j),)
        is_local = is_local + ((experts[j] >= 0) & (experts[j] < LOCAL),)
        shares = shares + (tl.load(experts_down_weights + t * TOP_K + j).to(tl.float32),)
    factors = (experts_down_w + LOCAL * (H * (INNER // 8))).to(tl.pointer_type(tl.float32))
    acc = tl.zeros([BLOCK_Q, BLOCK_N, 1], tl.float32)
    for j in tl.static_range(TOP_K):  # unrolled, so that all experts' weights are loaded at once
        held = tl.where(is_local[j], experts[j], 0)
        factor = tl.load(factors + held * H + row, mask=ok_n, other=0.0) * (shares[j] * UNIT)
        for q0 in tl.static_range(0, INNER // 32, BLOCK_Q):
            q = q0 + tl.arange(0, BLOCK_Q)
            quads = _load_expert(experts_down_w, experts[j], is_local[j], row, q, LOCAL, H, INNER)
            part = _times_x(quads, experts_down_h + (t * TOP_K + j) * INNER, q, INNER)
            acc += part * factor[None, :, None]
    out = tl.sum(tl.sum(acc, 2), 0)
    gate = tl.sigmoid(tl.load(gated_add_g + t).to(tl.float32))
    out += gate * _shared_sum(
        linear_w,
        row,
        ok_n,
        linear_x + t * SHARED,
        H,
        SHARED,
        BLOCK_N,
        BLOCK_S,
    )
    tl.store(gated_add_y + t * H + row, out, mask=ok_n)
