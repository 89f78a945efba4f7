"""qk_norm_rope_write

split_gate: q, gate = first and second half of each head of qg
head_norm: y = rms_norm(x) of each head
rope: y = x with the first `rotary_dim` of each head rotated, in pairs (i, i + rotary_dim / 2)
head_norm: y = rms_norm(x) of each head
rope: y = x with the first `rotary_dim` of each head rotated, in pairs (i, i + rotary_dim / 2)
kv_write: kv_cache[slot_mapping] = k, v
Source: rotary embedding (arXiv:2104.09864) of the first ROTARY dimensions,
pairs i and i + ROTARY / 2

Grid: (token, head). One program normalises and rotates one query or key head of one
token; that of a key head also writes key and value into the page of the token's slot.
Q query heads, KV key/value heads, D head_dim, ROTARY dimensions that are rotated, PAGE tokens a
page.
"""

import triton
import triton.language as tl


@triton.jit
def _norm_rope(x_ptr, w_ptr, d, position, D: tl.constexpr, ROTARY: tl.constexpr, EPS: tl.constexpr):
    """RMSNorm of one head, then its rotation by `position`."""
    half: tl.constexpr = ROTARY // 2
    pair = tl.where(d < half, d + half, tl.where(d < ROTARY, d - half, d))
    x, other = tl.load(x_ptr + d).to(tl.float32), tl.load(x_ptr + pair).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / D + EPS)
    x *= scale * (1.0 + tl.load(w_ptr + d).to(tl.float32))
    other *= scale * (1.0 + tl.load(w_ptr + pair).to(tl.float32))
    i = d % half
    inverse = tl.zeros([D], tl.float32)
    inverse = tl.where(i == 0, 1.0, inverse)
    inverse = tl.where(i == 1, 0.6042963902381329, inverse)
    inverse = tl.where(i == 2, 0.3651741272548377, inverse)
    inverse = tl.where(i == 3, 0.220673406908459, inverse)
    inverse = tl.where(i == 4, 0.1333521432163324, inverse)
    inverse = tl.where(i == 5, 0.08058421877614819, inverse)
    inverse = tl.where(i == 6, 0.04869675251658631, inverse)
    inverse = tl.where(i == 7, 0.029427271762092817, inverse)
    inverse = tl.where(i == 8, 0.01778279410038923, inverse)
    inverse = tl.where(i == 9, 0.010746078283213174, inverse)
    inverse = tl.where(i == 10, 0.006493816315762113, inverse)
    inverse = tl.where(i == 11, 0.003924189758484536, inverse)
    inverse = tl.where(i == 12, 0.0023713737056616554, inverse)
    inverse = tl.where(i == 13, 0.0014330125702369627, inverse)
    inverse = tl.where(i == 14, 0.0008659643233600654, inverse)
    inverse = tl.where(i == 15, 0.0005232991146814947, inverse)
    inverse = tl.where(i == 16, 0.00031622776601683794, inverse)
    inverse = tl.where(i == 17, 0.00019109529749704405, inverse)
    inverse = tl.where(i == 18, 0.00011547819846894582, inverse)
    inverse = tl.where(i == 19, 6.978305848598664e-05, inverse)
    inverse = tl.where(i == 20, 4.216965034285822e-05, inverse)
    inverse = tl.where(i == 21, 2.5482967479793464e-05, inverse)
    inverse = tl.where(i == 22, 1.539926526059492e-05, inverse)
    inverse = tl.where(i == 23, 9.30572040929699e-06, inverse)
    inverse = tl.where(i == 24, 5.623413251903491e-06, inverse)
    inverse = tl.where(i == 25, 3.3982083289425593e-06, inverse)
    inverse = tl.where(i == 26, 2.053525026457146e-06, inverse)
    inverse = tl.where(i == 27, 1.2409377607517195e-06, inverse)
    inverse = tl.where(i == 28, 7.498942093324558e-07, inverse)
    inverse = tl.where(i == 29, 4.531583637600818e-07, inverse)
    inverse = tl.where(i == 30, 2.7384196342643614e-07, inverse)
    inverse = tl.where(i == 31, 1.6548170999431814e-07, inverse)
    # The angle in quarter turns, reduced in fp64: a large angle keeps its digits, and the series
    # below are short and exact.
    quarters = (position.to(tl.float32) * inverse).to(tl.float64) * 0.6366197723675814
    whole = tl.floor(quarters + 0.5)
    a = ((quarters - whole) * 1.5707963267948966).to(tl.float32)
    quadrant = whole.to(tl.int64) & 3
    b = a * a
    sine = a * (1.0 + b * (-1 / 6 + b * (1 / 120 + b * (-1 / 5040 + b * (1 / 362880)))))
    cosine = 1.0 + b * (
        -1 / 2 + b * (1 / 24 + b * (-1 / 720 + b * (1 / 40320 - b * (1 / 3628800))))
    )
    sin = tl.where(quadrant % 2 == 0, sine, cosine) * tl.where(quadrant >= 2, -1.0, 1.0)
    cos = tl.where(quadrant % 2 == 0, cosine, sine) * tl.where(
        (quadrant == 1) | (quadrant == 2), -1.0, 1.0
    )
    sign = tl.where(d < half, -1.0, 1.0)
    turned = x * cos + sign * other * sin
    return tl.where(d < ROTARY, turned, x)


@triton.jit
def qk_norm_rope_write(
    split_gate_qg,  # input, bf16 [num_tokens, 2048]
    rope_positions,  # input, i32 [num_tokens]
    head_norm_x,  # input, bf16 [num_tokens, 256]
    kv_write_v,  # input, bf16 [num_tokens, 256]
    kv_write_slot_mapping,  # input, i32 [num_tokens]
    head_norm_w,  # weight, bf16 [256]
    head_norm_w2,  # weight, bf16 [256]
    kv_write_kv_cache,  # state, fp8 [4057, 2, 64, 1, 256]
    split_gate_gate,  # output, bf16 [num_tokens, 1024]
    rope_y,  # output, bf16 [num_tokens, 1024]
    num_tokens,  # i32
    num_seqs,  # i32
):
    D: tl.constexpr = 256
    EPS: tl.constexpr = 1e-06
    KV: tl.constexpr = 1
    PAGE: tl.constexpr = 64
    Q: tl.constexpr = 4
    ROTARY: tl.constexpr = 64

    t, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, D)
    position = tl.load(rope_positions + t)
    if head < Q:
        pair_ptr = split_gate_qg + (t * Q + head) * 2 * D  # each head: query, then gate
        out = (t * Q + head) * D + d
        gate = tl.load(pair_ptr + D + d)
        tl.store(rope_y + out, _norm_rope(pair_ptr, head_norm_w, d, position, D, ROTARY, EPS))
        tl.store(split_gate_gate + out, gate)
    else:
        head -= Q
        value = tl.load(kv_write_v + (t * KV + head) * D + d)  # loads come before stores
        key = _norm_rope(
            head_norm_x + (t * KV + head) * D, head_norm_w2, d, position, D, ROTARY, EPS
        )
        slot = tl.load(kv_write_slot_mapping + t)
        offset = ((slot // PAGE).to(tl.int64) * 2 * PAGE + slot % PAGE) * KV * D + head * D + d
        tl.store(kv_write_kv_cache + offset, tl.clamp(key.to(tl.float32), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv))
        tl.store(kv_write_kv_cache + offset + PAGE * KV * D, tl.clamp(value.to(tl.float32), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv))
