"""gated_norm

gated_norm: y = x / sqrt(mean(x^2) + eps) * w * silu(z), per head
Source: RMSNorm (arXiv:1910.07467) of each head, then the gate: the weight as it is stored

Grid: (block of BLOCK_T tokens, head). One program normalises and gates one head of its tokens.
HEADS value heads of D; `t` counts tokens, `d` dimensions of the head.
"""

import triton
import triton.language as tl


@triton.jit
def gated_norm(
    x,  # input, bf16 [num_tokens, 1024]
    z,  # input, bf16 [num_tokens, 1024]
    w,  # weight, fp32 [128]
    y,  # output, bf16 [num_tokens, 1024]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK_T: tl.constexpr = 16
    D: tl.constexpr = 128
    EPS: tl.constexpr = 1e-06
    HEADS: tl.constexpr = 8

    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, D)
    ok = (t < num_tokens)[:, None]
    offsets = (t * HEADS + tl.program_id(1))[:, None] * D + d[None, :]
    value = tl.load(x + offsets, mask=ok, other=0.0).to(tl.float32)
    gate = tl.load(z + offsets, mask=ok, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / D + EPS)
    value *= scale[:, None] * tl.load(w + d)[None, :] * gate * tl.sigmoid(gate)
    tl.store(y + offsets, value, mask=ok)
